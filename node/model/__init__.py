"""What a model file holds: configuration, weights by block, tokenizer, chat template, sampling.

Knows nothing of sessions, links or plans, and computes nothing: that is `node/engine/`.
"""
