"""(post, criterion) to prompt, and prompts to token arrays (FR-002).

Comes in: texts and a tokenizer. Goes out: `EncodedPairs`, and counts of what was shortened.
Does not belong here: loading a tokenizer (`model`), batches (`training`).
"""
