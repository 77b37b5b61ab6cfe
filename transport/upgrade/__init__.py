"""Better ways for links that stand: over the link the two ends agree on what to try, and try it."""
