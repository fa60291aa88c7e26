"""Ways to change a model that is there: each file is a (start, feed, objective) for the one trainer.

`sft` teaches a run to answer, by conversations; `esft` limits what learns of it to the experts that these use. `from_use` does what `sft`
does with answers that people accepted (`feedback`), and keeps it if that does good (`gate`); `rollback` is the way back.
`rewards` has tasks whose answers programs judge (`evals.verifiers`).
"""
