"""Makes training text better before it is read: rules that judge documents, and what else a corpus goes through.

`words` splits text once for all rules, `document` holds what they share, `rules` applies them to Arrow batches. `duplicates` and
`lines` look at a corpus as a whole, in `parts`; `pipeline` puts the stages together. `select` takes what is like a sample, `synth` makes
exercises. `taught` has a teacher (`teachers`) make texts: `rewrites`, `questions` and `posed` exercises are its makers (`making`).
"""
