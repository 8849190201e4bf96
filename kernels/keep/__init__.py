"""The reference semantics of `keep`: scores of tokens, budgets of heads, kept indices, merged tokens.

Pure functions of tensors over [B, H, T], B = batch, H = KV heads, T = slots of the cache (hidden ones included). No
shape depends on a value, nothing is copied to the host, sums are in fp32 (fp64 if the inputs are).
"""
