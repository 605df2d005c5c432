"""Turns (post, criterion) pairs into prompts, and prompts into token arrays (FR-002).

Comes in: texts and a tokenizer. Goes out: `EncodedPairs`, and counts of shortened posts.
Does not belong here: loading a tokenizer (`model`), batches (`training`).
"""
