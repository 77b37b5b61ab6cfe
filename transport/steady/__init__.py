"""A link that outlives what carries it: frames are numbered, kept until confirmed, sent again."""
