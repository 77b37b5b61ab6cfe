"""One running peer: composes the model, the links, the planner and the store."""
