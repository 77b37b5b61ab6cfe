"""What a person is told of a front: what bounds a plan, what would help, why not."""
