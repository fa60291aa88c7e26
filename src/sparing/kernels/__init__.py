"""Fast paths. Each file holds the plain PyTorch reference, the fast path, and the rule by which one is chosen.

Shape legend used throughout: B sequences, T positions, N = B*T tokens, D hidden size, H heads, K query/key width of a head,
V value width of a head, E experts, F expert width, S = N * experts per token (rows that reach an expert), W vocabulary words.
"""
