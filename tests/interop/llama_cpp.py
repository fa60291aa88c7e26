"""llama.cpp on GGUF files, as a program of its own, because it aborts where it asserts.

[{"model": PATH, "prompts": [ids or text, ...], "tokens": N, "mtp": false, "ends": false}, ...] on standard input; with `ends`, a text may
end before N tokens. On standard output, for each, a list of {"tokens": ids, "text": text, "finish": why it ended, "logprobs": of the first
tokens, "prompt_tokens": n, "drafted": n, "accepted": n}.
"""

import itertools
import json
import os
import subprocess
import sys


def run(*requests: dict, limit_s: float = 300) -> list[list[dict]]:
    """Greedy continuations. Without `ends` it forbids what its vocabulary ends texts with: tokens 0 and 4 of ours.

    limit_s: seconds that it may take. Where it dies, the AssertionError has the end of its log.
    """
    done = subprocess.run([sys.executable, __file__], input=json.dumps(requests), capture_output=True, text=True, timeout=limit_s)
    assert done.returncode == 0, f"llama.cpp ended with {done.returncode}: {done.stderr[-3000:]}"
    return json.loads(done.stdout.splitlines()[-1])


def continued(server, prompt, tokens: int, ends: bool) -> dict:
    body = {"prompt": prompt, "max_tokens": tokens, "temperature": 0.0, "ignore_eos": not ends, "cache_prompt": False, "logprobs": 1}
    found = server.handle_completions(body | {"return_tokens": True, "verbose": True})
    made = found["__verbose"]["tokens"]
    # It leaves tokens out whose bytes are no whole character, so rows belong to tokens only as far as they are the same.
    rows = zip(made, (found["choices"][0]["logprobs"] or {"content": []})["content"])
    rows = [row for token, row in itertools.takewhile(lambda pair: pair[0] == pair[1]["id"], rows)]
    return {
        "tokens": made,
        "text": found["choices"][0]["text"],
        "finish": found["choices"][0]["finish_reason"],
        "logprobs": [row["logprob"] for row in rows],
        "prompt_tokens": found["usage"]["prompt_tokens"],
        "drafted": found["timings"].get("draft_n", 0),
        "accepted": found["timings"].get("draft_n_accepted", 0),
    }


def main() -> None:
    import xllamacpp as xlc

    requests = json.load(sys.stdin)
    answer = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # llama.cpp's log goes where logs go
    found, servers = [], []
    for request in requests:
        params = xlc.CommonParams()
        params.model.path = request["model"]
        params.n_ctx, params.n_parallel, params.n_batch, params.n_ubatch = 512, 1, 512, 512
        params.cache_type_k = params.cache_type_v = xlc.ggml_type.GGML_TYPE_F32
        params.flash_attn_type = xlc.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED
        params.cpuparams.n_threads = params.cpuparams_batch.n_threads = 1
        params.n_gpu_layers, params.warmup, params.fit_params, params.cache_ram_mib = 0, False, False, 0
        if request.get("mtp"):
            params.load_mtp = True
            params.speculative.types = [xlc.common_speculative_type.COMMON_SPECULATIVE_TYPE_DRAFT_MTP]
            params.speculative.draft.n_max = 1
        servers.append(xlc.Server(params))
        found.append([continued(servers[-1], prompt, request["tokens"], request.get("ends", False)) for prompt in request["prompts"]])
    answer.write(json.dumps(found) + "\n")
    answer.flush()
    os._exit(0)  # without waiting for its threads


if __name__ == "__main__":
    main()
