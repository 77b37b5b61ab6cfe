"""One command per figure that the README quotes; see `LOG.md` for what was measured when."""
