"""The search for the front: which plans are worth having."""
