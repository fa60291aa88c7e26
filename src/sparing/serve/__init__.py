"""A run folder as a server: OpenAI's HTTP interface, a chat page, metrics.

`entry.serve` checks the options, `server` starts and drains it, `app` has the routes, `requests` what a request may say (the OpenAPI
document is made from it), `body` checks it, `chat` and `completions` turn a request into prompts and pieces into answers, `streams` sits
between the engine's thread and asyncio.
"""
