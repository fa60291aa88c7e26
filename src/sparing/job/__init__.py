"""Whatever learns is a job: `begin` takes lock, meter and signals and resolves the configuration; `start` says where weights come from;
`corpus` says what is learnt; `learn` trains; `finish` writes completions, model card and summary. Every stage can be killed and repeated.

`queue` runs many jobs, each in a process of its own: `queue_file` says what they are, `schedule` decides who runs when.
"""
