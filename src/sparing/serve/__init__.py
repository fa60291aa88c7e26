"""Serves a run over HTTP: OpenAI's interface, a chat page, metrics.

`entry.serve` checks the options, `server` starts and stops, `app` has the routes. `requests` says what bodies may contain, `completions`
turns a body into prompts and pieces into OpenAI's objects, `answer` carries pieces from the engine's thread to asyncio and the client.
"""
