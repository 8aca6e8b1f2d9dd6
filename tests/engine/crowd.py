"""Random requests, each served alone and then all of them in a crowd, by one engine in this process."""

import random
from dataclasses import dataclass, field


@dataclass(frozen=True)
class Asked:
    """One request.

    Attributes:
        prompt: token ids.
        sampling: what vLLM's SamplingParams are made of.
        priority: lower ones go first.
        leaves: steps after which it is aborted in the crowd; None if it stays.
    """

    prompt: tuple[int, ...]
    sampling: dict
    priority: int = 0
    leaves: int | None = None


@dataclass
class Answer:
    """What became of a request: per sample its tokens and their log-probabilities, and those of the prompt."""

    tokens: dict[int, list[int]] = field(default_factory=dict)
    logprobs: dict[int, list[float]] = field(default_factory=dict)
    prompt: list[float] = field(default_factory=list)
    finished: bool = False


def random_requests(count, tokens, longest, seed):
    """Of every kind: short and long, greedy ones, some of several samples, some whose prompt is scored too."""
    draw = random.Random(seed)
    asked = []
    for _ in range(count):
        length = draw.choice((draw.randrange(1, 150), draw.randrange(100, longest)))
        first = draw.randrange(len(tokens) - length)
        sampling = {"temperature": 0, "max_tokens": draw.randrange(1, 200), "ignore_eos": True, "logprobs": 0}
        if draw.random() < 0.15:
            sampling |= {"n": 2, "temperature": 0.7, "top_k": 1}
        if draw.random() < 0.5:
            sampling["prompt_logprobs"] = 0
        leaves = draw.randrange(1, 40) if draw.random() < 0.1 else None
        asked.append(Asked(tuple(tokens[first : first + length]), sampling, draw.randrange(3), leaves))
    return asked


class Crowd:
    """An engine that answers requests, and says how often it preempted one."""

    def __init__(self, model, **arguments):
        from vllm import LLM

        self.llm = LLM(model, dtype="float32", enforce_eager=True, seed=0, disable_log_stats=False, **arguments)
        self.engine = self.llm.llm_engine
        self.core = self.engine.engine_core.engine_core
        self._ids = 0

    def alone(self, asked):
        """Each request with the engine to itself."""
        return [self._serve([request], 1.0)[0] for request in asked]

    def together(self, asked, joining=0.3, seed=0):
        """All of them, joining at random, with this probability in each step."""
        return self._serve(asked, joining, random.Random(seed))

    @property
    def preemptions(self):
        """Since the engine started."""
        return next(metric.value for metric in self.llm.get_metrics() if metric.name == "vllm:num_preemptions")

    def close(self):
        import gc

        from vllm.distributed.parallel_state import cleanup_dist_env_and_memory

        self.core.shutdown()
        del self.llm, self.engine, self.core
        cleanup_dist_env_and_memory()
        gc.collect()

    def _serve(self, asked, joining, draw=None):
        from vllm import SamplingParams

        answers, names, leaving = [Answer() for _ in asked], {}, {}
        waiting, step = list(enumerate(asked)), 0
        while waiting or self.engine.has_unfinished_requests():
            while waiting and (draw is None or draw.random() < joining):
                index, request = waiting.pop(0)
                name, self._ids = f"crowd{self._ids}", self._ids + 1
                names[name] = answers[index]
                if draw is not None and request.leaves is not None:
                    leaving[name] = step + request.leaves
                self.engine.add_request(
                    name,
                    {"prompt_token_ids": list(request.prompt)},
                    SamplingParams(**request.sampling),
                    priority=request.priority,
                )
            for output in self.engine.step():
                answer = names[output.request_id]
                answer.finished = output.finished
                answer.prompt = [
                    entry[token].logprob
                    for token, entry in zip(output.prompt_token_ids, output.prompt_logprobs or (), strict=False)
                    if entry is not None
                ]
                for sample in output.outputs:
                    ids = list(sample.token_ids)
                    answer.tokens[sample.index] = ids
                    answer.logprobs[sample.index] = [
                        entry[token].logprob for token, entry in zip(ids, sample.logprobs, strict=True)
                    ]
            step += 1
            for name in [name for name, when in leaving.items() if when <= step]:
                del leaving[name]
                if not names[name].finished:
                    self.engine.abort_request([name])
        return answers


def differences(alone, together):
    """Over what both have: answers whose tokens differ, and the largest difference of a log-probability before that."""
    other_tokens, worst = 0, 0.0
    for one, other in zip(alone, together, strict=True):
        pairs = list(zip(one.prompt, other.prompt, strict=False))
        different = False
        for sample, ids in other.tokens.items():
            own, theirs = one.tokens[sample][: len(ids)], ids
            same = next((i for i, (a, b) in enumerate(zip(own, theirs, strict=True)) if a != b), len(ids))
            different = different or same < len(ids)
            pairs += zip(one.logprobs[sample][:same], other.logprobs[sample][:same], strict=True)
        other_tokens += different
        worst = max([worst, *(abs(a - b) for a, b in pairs)])
    return other_tokens, worst
