"""The next token: its distribution, what sampling makes of it, and a reply token by token."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from jetson_ft.data.chat_template import ANSWER, END, end_ids
from jetson_ft.errors import UserError, _
from jetson_ft.inference.generate import Sampling, generate_replies, sampling_steps
from jetson_ft.inside.examples import SAMPLING
from jetson_ft.inside.model import (
    DECIMALS,
    LoadedModel,
    View,
    answered,
    conversation,
    each_side,
    logits_at,
    prompt_ids,
    sides_of,
    significant,
    text_ids,
    use_side,
)
from jetson_ft.inside.tokens import Token, describe_tokens

if TYPE_CHECKING:
    import torch

MAX_TOKENS = 2048  # of a prompt
MAX_STEPS = 128  # tokens of a reply that is stepped through
MAX_TOP = 100  # tokens of a distribution that are shown


@dataclass(frozen=True)
class Candidate(View):
    """A token that can come next."""

    token: Token
    logit: float
    probability: float  # by the model
    # By each step of sampling; 0: the step, or one before it, cut the token.
    after: dict[str, float]


@dataclass(frozen=True)
class StepSummary(View):
    """The distribution after a step of sampling."""

    name: str  # `model` is the model's own; then the settings with an effect, in their order
    kept: int  # tokens with a probability above 0
    entropy: float  # bits


@dataclass(frozen=True)
class NextToken(View):
    """The distribution of the next token of the base or of the adapter."""

    # The likeliest by the model, and any that sampling puts before them.
    candidates: list[Candidate]
    shown: float  # the sum of their probabilities by the model
    steps: list[StepSummary]
    greedy: int  # the id that a greedy reply takes


@dataclass(frozen=True)
class NextTokenView(View):
    """What comes next after a text, before and after each step of sampling."""

    tokens: list[Token]
    sides: dict[str, NextToken]


def view_next_token(
    loaded: LoadedModel,
    text: str,
    reply: str = "",
    system: str = "",
    use_template: bool = True,
    sampling: Sampling = SAMPLING,
    top: int = 20,
) -> NextTokenView:
    """Return the distribution of the next token, for the base and for the adapter.

    Args:
        reply: the start of the reply to `text`.
        use_template: `text` is a question in the chat template; False: a text to continue.
        sampling: the settings whose steps are shown; a temperature of 0 draws nothing.
        top: number of candidates.

    Raises:
        UserError: the text is empty or too long, or the chat template refuses it.
    """
    if use_template:
        ids = prompt_ids(loaded, text, reply, system, MAX_TOKENS)
    else:
        ids = text_ids(loaded, text + reply, MAX_TOKENS)
    top = max(1, min(top, MAX_TOP))

    def compute() -> NextToken:
        logits = logits_at(loaded.model, ids, [len(ids) - 1])
        return _next_token(loaded.tokenizer, distributions(logits, ids, sampling), top)

    sides = each_side(loaded, compute)
    return NextTokenView(describe_tokens(loaded.tokenizer, ids), sides)


def distributions(
    logits: torch.Tensor, ids: list[int], sampling: Sampling
) -> list[tuple[str, torch.Tensor]]:
    """Return the name and the logits [vocabulary] of the model and of each step of sampling.

    The steps are those of generation: a reply draws from the softmax of the last one.

    Args:
        logits: of the next token: [1, vocabulary].
        ids: the tokens before it, which a repetition penalty concerns.
    """
    import torch

    scores = logits.float()  # as generation does
    before = torch.tensor([ids], device=logits.device)
    results = [("model", scores[0])]
    for name, step in sampling_steps(sampling):
        scores = step(before, scores)
        results.append((name, scores[0]))
    return results


def _next_token(tokenizer: Any, steps: list[tuple[str, torch.Tensor]], top: int) -> NextToken:
    import torch

    logits = steps[0][1]
    probs = {name: scores.softmax(0) for name, scores in steps}
    own, last = probs["model"], steps[-1][1]
    top = min(top, len(own))
    chosen = own.topk(top).indices.tolist()
    # A repetition penalty can put other tokens first. Those that a step cut are at -inf.
    best = last.topk(min(3, top)).indices.tolist()
    chosen += [i for i in best if last[i] > -torch.inf and i not in chosen]
    candidates = [
        Candidate(
            token,
            significant(logits[token.id]),
            significant(own[token.id]),
            {name: significant(each[token.id]) for name, each in probs.items() if name != "model"},
        )
        for token in describe_tokens(tokenizer, chosen)
    ]
    summaries = []
    for name, each in probs.items():
        entropy = -torch.xlogy(each, each).sum() / torch.tensor(2.0).log()
        summaries.append(StepSummary(name, int((each > 0).sum()), max(0.0, significant(entropy))))
    return NextToken(candidates, significant(own[chosen].sum()), summaries, int(last.argmax()))


# --- a reply, token by token --------------------------------------------------------------------


@dataclass(frozen=True)
class TokenChoice(View):
    """What one side gives for one position of a reply."""

    probability: float  # of the reply's token
    rank: int  # of that token, 1 is the likeliest
    top: list[Candidate]


@dataclass(frozen=True)
class ReplyStep(View):
    """One token of a reply, as base and adapter predict it from the same tokens before it."""

    token: Token
    sides: dict[str, TokenChoice]
    # Jensen-Shannon divergence of the two distributions in bits, from 0 to 1 (Lin, Divergence
    # Measures Based on the Shannon Entropy, 1991), and Kullback-Leibler of the adapter's from the
    # base's, in bits; None without an adapter.
    jensen_shannon: float | None = None
    kullback_leibler: float | None = None


@dataclass(frozen=True)
class ReplyView(View):
    """A reply token by token."""

    prompt: list[Token]
    steps: list[ReplyStep]
    nats: dict[str, float]  # of the whole reply, by side: the negative log-likelihood
    most_different: list[int]  # steps, the largest divergence first


def view_reply(
    loaded: LoadedModel,
    text: str,
    answer: str | None = None,
    system: str = "",
    max_new_tokens: int = 24,
    top: int = 5,
) -> ReplyView:
    """Return the probability of each token of a reply, for the base and for the adapter.

    Args:
        text: the question.
        answer: the reply; None: the greedy one of the adapter, or of the base without one.
        max_new_tokens: longest greedy reply.
        top: likeliest tokens that are listed for each position.

    Raises:
        UserError: the conversation is too long, or the chat template refuses it.
    """
    if answer is None:
        limit = max(1, min(max_new_tokens, MAX_STEPS))
        prompt = prompt_ids(
            loaded, text, "", system, min(MAX_TOKENS, loaded.context_length - limit)
        )
        ends = end_ids(loaded.tokenizer, loaded.model)
        with use_side(loaded, sides_of(loaded)[-1]):
            (reply,) = generate_replies(loaded.model, loaded.tokenizer, [prompt], ends, limit)
        ids = [*prompt, *reply.ids]
        places = list(range(len(prompt), len(ids)))
    else:
        encoded = answered(loaded, conversation(text, system), answer, MAX_TOKENS)
        ids = encoded.ids
        places = [i for i, role in enumerate(encoded.segments) if role in (ANSWER, END)]
    if len(places) > MAX_STEPS:
        raise UserError(
            _("The reply has {tokens:,} tokens, and this view shows {limit:,} at most."),
            fix=_("Shorten it."), tokens=len(places), limit=MAX_STEPS,
        )  # fmt: skip
    sides = each_side(loaded, lambda: logits_at(loaded.model, ids, [place - 1 for place in places]))
    top = max(1, min(top, MAX_TOP))
    nats = dict.fromkeys(sides, 0.0)
    steps = []
    for index, token in enumerate(describe_tokens(loaded.tokenizer, [ids[i] for i in places])):
        log_probs = {side: each[index].float().log_softmax(0) for side, each in sides.items()}
        choices = {}
        for side, each in log_probs.items():
            nats[side] -= float(each[token.id])
            choices[side] = _choice(loaded.tokenizer, sides[side][index], each, token.id, top)
        step = ReplyStep(token, choices)
        if "adapter" in log_probs:
            divergences = _divergences(log_probs["adapter"], log_probs["base"])
            step = replace(
                step, jensen_shannon=divergences[0], kullback_leibler=divergences[1]
            )  # fmt: skip
        steps.append(step)
    order = sorted(range(len(steps)), key=lambda i: -(steps[i].jensen_shannon or 0))
    return ReplyView(
        describe_tokens(loaded.tokenizer, ids[: places[0]]), steps,
        {side: round(value, DECIMALS) for side, value in nats.items()},
        order if loaded.has_adapter else [],
    )  # fmt: skip


def _choice(
    tokenizer: Any, logits: torch.Tensor, log_probs: torch.Tensor, number: int, top: int
) -> TokenChoice:
    best = log_probs.topk(min(top, len(log_probs))).indices.tolist()
    candidates = [
        Candidate(token, significant(logits[token.id]), significant(log_probs[token.id].exp()), {})
        for token in describe_tokens(tokenizer, best)
    ]
    rank = int((log_probs > log_probs[number]).sum()) + 1
    return TokenChoice(significant(log_probs[number].exp()), rank, candidates)


def _divergences(first: torch.Tensor, second: torch.Tensor) -> tuple[float, float]:
    """Return Jensen-Shannon and Kullback-Leibler divergence of log-probabilities, in bits."""
    import torch

    def kl(of: torch.Tensor, to: torch.Tensor) -> float:
        terms = torch.where(of > -torch.inf, of.exp() * (of - to), 0.0)
        return max(0.0, float(terms.double().sum() / torch.tensor(2.0).log()))

    mean = torch.logaddexp(first, second) - torch.tensor(2.0).log()
    return significant((kl(first, mean) + kl(second, mean)) / 2), significant(kl(first, second))
