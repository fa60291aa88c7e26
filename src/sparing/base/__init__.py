"""What every other folder may use: configuration, layers of a model, the run folder, files, locks, messages, the machine, the client
of OpenAI's interface."""
