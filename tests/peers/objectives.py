"""The objectives of `docs/OBJECTIVES.md` as losses that autograd differentiates, from their published formulas.

A row is an answer, a dictionary: `group`, `label`, `reward`, `truncated`, and float64 tensors with a number a token:
`new`, `old`, `rollout` and `reference` log-probs, `entropies` of the policy, `values` of the critic. Only `new`,
`entropies` and the critic's new values carry a gradient.
"""

import torch

# Settings of the papers, by kind: estimator of advantages, whether they are whitened, level of the ratio, aggregation,
# bounds of the ratio, bound of the loss of negative advantages (0: none), and whether truncated answers are left out.
PUBLISHED = {
    "grpo": ("standardised", False, "token", "seq_mean_token_mean", 0.2, 0.2, 3.0, False),
    "dr_grpo": ("centred", False, "token", "seq_mean_token_sum_norm", 0.2, 0.2, 0.0, False),
    "dapo": ("standardised", False, "token", "token_mean", 0.2, 0.28, 0.0, True),
    "gspo": ("standardised", False, "answer", "seq_mean_token_mean", 3e-4, 4e-4, 0.0, False),
    "rloo": ("leave_one_out", False, "token", "seq_mean_token_sum", 0.2, 0.2, 3.0, False),
    "reinforce_pp": ("returns", True, "token", "token_mean", 0.2, 0.2, 3.0, False),
    "reinforce_pp_baseline": ("centred", True, "token", "token_mean", 0.2, 0.2, 3.0, False),
    "ppo": ("gae", True, "token", "seq_mean_token_mean", 0.2, 0.2, 3.0, False),
    "weighted_rloo": ("weighted_leave_one_out", False, "token", "seq_mean_token_sum", 0.2, 0.2, 3.0, False),
    "maxrl": ("over_mean", False, "token", "seq_mean_token_sum", 0.2, 0.2, 3.0, False),
    "cispo": ("standardised", False, "weight", "token_mean", 1.0, 4.0, 0.0, False),
    "dppo": ("standardised", False, "mask", "token_mean", 0.2, 0.2, 0.0, False),
}
NAMES = ("advantage", "whiten", "ratio", "aggregation", "clip_low", "clip_high", "dual_clip", "mask_truncated")

OF_ALL_BUT_PACS = {
    "reference_reset_steps": 0,
    "entropy_coefficient": 0.0,
    "kl_coefficient": 0.0,
    "kl_kind": "k3",
    "kl_place": "loss",
    "importance": "off",
    "importance_level": "token",
    "importance_cap": 2.0,
}
OF_PACS = {
    "beta": 1.0,
    "score": "rloo",
    "reward_method": "log_ratio",
    "label_weights": "question",
    "actor_term": False,
    "reset_optimizer": False,
    "reference_reset_steps": 1,
    "importance": "off",
    "importance_level": "sequence",
    "importance_cap": 2.0,
}
OF_WEIGHTED_RLOO = {"pass_exponent": 1.0, "fail_exponent": 1.0}
OF_DPPO = {"divergence": "tv", "ratio_cap": 20.0}
OF_ANSWERS = {
    "real": {"tau": 0.5},
    "disco": {"tau": 10.0, "constraint_delta": 1e-4, "constraint_penalty": 1e3},
}
OF_PPO = {"gamma": 1.0, "lambda": 1.0, "value_clip": 0.5, "critic_learning_rate": 1e-5, "critic_warmup_steps": 0}


def settings(objective):
    """All settings of the `[objective]` of a job; refuses what is not computed here."""
    kind = objective.get("kind", "pacs")
    if kind == "pacs":
        known = dict(OF_PACS)
    elif kind in PUBLISHED:
        known = dict(zip(NAMES, PUBLISHED[kind])) | OF_ALL_BUT_PACS
        known |= OF_PPO if kind == "ppo" else {"gamma": 1.0} if kind == "reinforce_pp" else {}
        known |= OF_WEIGHTED_RLOO if kind == "weighted_rloo" else OF_DPPO if kind == "dppo" else {}
    elif kind in OF_ANSWERS:
        known = dict(OF_ANSWERS[kind])
    elif kind == "external":
        # The program that `deploy/objectives` has as an example is the only one that is known here.
        known = {"command": [], "timeout_seconds": 60.0}
    else:
        raise SystemExit(f"objective {kind} is not computed here")
    unknown = objective.keys() - known.keys() - {"kind"}
    if unknown:
        raise SystemExit(f"settings of {kind} that are not computed here: {sorted(unknown)}")
    # What has no reference of its own compares with the policy at the start of the step, or with nothing.
    return {"reference_reset_steps": 0, "reset_optimizer": False, "kl_coefficient": 0.0} | known | objective | {"kind": kind}


def by_group(rows):
    groups = {}
    for row in rows:
        groups.setdefault(row["group"], []).append(row)
    return list(groups.values())


# PACS


def scores(proxies, estimator):
    """Scores of a group; the baseline is differentiated through."""
    if estimator == "rloo":
        return proxies - (proxies.sum() - proxies) / (len(proxies) - 1)
    if estimator == "dr_grpo":
        return proxies - proxies.mean()
    if estimator == "grpo":
        return (proxies - proxies.mean()) / (proxies.std() + 1e-6)
    assert estimator == "naive", estimator
    return proxies


def label_weights(label, labels, mode):
    """What `ln sigma(score)` and `ln (1 - sigma(score))` weigh in the cross entropy of an answer, before its label."""
    if mode == "question":
        n, right = len(labels), sum(labels)
        return (n / (2 * right), n / (2 * (n - right))) if 0 < right < n else (1.0, 1.0)
    weight = {"none": 1.0, "only_positive": float(label == 1), "only_negative": float(label == 0)}[mode]
    return weight, weight


def pacs_loss(rows, s):
    """Mean over answers of the weighted cross entropy of their labels with their scores.

    With `actor_term` the score-function estimate of the rest of the gradient is added: cross entropy as a constant times
    the log-probability of the answer, which changes the gradient and is no part of the reported loss.
    """
    losses = []
    for group in by_group(rows):
        if s["reward_method"] == "log_ratio":
            proxies = torch.stack([(row["new"] - row["old"]).sum() for row in group])
        else:
            proxies = torch.stack([row["new"].mean() for row in group])
        labels = [row["label"] for row in group]
        for row, score in zip(group, scores(s["beta"] * proxies, s["score"])):
            label = float(row["label"])
            right, wrong = label_weights(label, labels, s["label_weights"])
            log_sigmoid = torch.nn.functional.logsigmoid
            loss = -right * label * log_sigmoid(score) - wrong * (1 - label) * log_sigmoid(-score)
            if s["importance"] != "off":
                loss = loss * importance_weights(row, s).mean()
            if s["actor_term"]:
                loss = loss + loss.detach() * row["new"].sum()
            losses.append(loss)
    return torch.stack(losses).mean()


# Others that know an answer by its log-prob


def real_loss(rows, s):
    """Mean over prompts of two logarithms of sums, one over what is right and one over what is wrong, each with an anchor."""
    losses = []
    for group in by_group(rows):
        logits = torch.stack([(row["new"] - row["old"]).mean() for row in group]) / s["tau"]
        labels = torch.tensor([float(row["label"]) for row in group], dtype=logits.dtype)
        losses.append((1 + (labels * (-logits).exp()).sum()).log() + (1 + ((1 - labels) * logits.exp()).sum()).log())
    return torch.stack(losses).mean()


def disco_loss(rows, s):
    """Mean over prompts of the gap between wrong and right answers, and a penalty for leaving the old policy."""
    losses = []
    for group in by_group(rows):
        scores = torch.stack([row["new"].mean() for row in group])
        labels = torch.tensor([float(row["label"]) for row in group], dtype=scores.dtype)
        right, wrong = labels.sum(), (1 - labels).sum()
        if right > 0 and wrong > 0:
            hardest = s["tau"] * (((1 - labels) * (scores / s["tau"]).exp()).sum() / wrong).log()
            losses.append(hardest - (labels * scores).sum() / right)
        else:
            losses.append(0.0 * scores.sum())
    divergence = torch.stack([(row["old"] - row["new"]).mean() for row in rows]).mean()
    beyond = (divergence - s["constraint_delta"]).clamp(min=0)
    return torch.stack(losses).mean() + s["constraint_penalty"] * beyond**2


def pairwise_loss(rows, s):
    """The example of a program: every right answer above every wrong one."""
    losses, beta = [], float(s["command"][-1])
    for group in by_group(rows):
        scores = [beta * (row["new"] - row["old"]).sum() for row in group]
        right = [score for row, score in zip(group, scores) if row["label"] > 0.5]
        wrong = [score for row, score in zip(group, scores) if row["label"] <= 0.5]
        pairs = [torch.nn.functional.softplus(b - a) for a in right for b in wrong]
        losses.append(torch.stack(pairs).mean() if pairs else 0.0 * sum(scores))
    return torch.stack(losses).mean()


ANSWER_LOSSES = {"pacs": pacs_loss, "real": real_loss, "disco": disco_loss, "external": pairwise_loss}


# The clipped policy gradient


def divergence(x, kind):
    """Estimates of the divergence from the reference, `x` the log of the policy's probability over the reference's."""
    if kind == "k1":
        return x
    if kind == "abs":
        return x.abs()
    if kind == "k2":
        return x**2 / 2
    assert kind == "k3", kind
    return ((-x).exp() + x - 1).clamp(max=10)


def counts(row, s):
    return not (s["mask_truncated"] and row["truncated"])


def aggregate(losses, how, max_new_tokens):
    """One number of the token losses of all answers that count."""
    if not losses:
        return torch.zeros(())
    if how == "token_mean":
        return torch.cat(losses).sum() / (sum(len(loss) for loss in losses) + 1e-8)
    if how == "seq_mean_token_mean":
        return torch.stack([loss.mean() for loss in losses]).mean()
    sums = torch.stack([loss.sum() for loss in losses])
    if how == "seq_mean_token_sum":
        return sums.mean()
    if how == "seq_mean_token_sum_norm":
        return sums.mean() / max_new_tokens
    assert how == "token_sum_norm", how
    return sums.sum() / max_new_tokens


def importance_weights(row, s):
    """Corrections for what the rollout engine sampled from, constants."""
    differences = row["old"] - row["rollout"]
    if s["importance_level"] == "sequence":
        differences = differences.sum().expand(len(differences))
    elif s["importance_level"] == "geometric":
        differences = differences.mean().expand(len(differences))
    weights, cap = differences.exp(), s["importance_cap"]
    if s["importance"] == "truncate":
        return weights.clamp(max=cap)
    assert s["importance"] == "mask", s["importance"]
    return torch.where((weights > cap) | (weights < 1 / cap), 0.0, weights)


def weighted_logprob(row, s):
    """`-A w ln p` with the clipped ratio as a constant weight."""
    weight = (row["new"] - row["old"]).exp().clamp(1 - s["clip_low"], 1 + s["clip_high"]).detach()
    return -row["advantages"] * weight * row["new"]


def masked_logprob(row, s):
    """`-A w ln p` with the ratio to the rollout engine as a constant weight, where probabilities have not gone too far."""
    new, advantage = row["new"].detach(), row["advantages"]
    now, before = new.exp(), row["rollout"].exp()
    if s["divergence"] == "tv":
        distance = (now - before).abs()
    else:
        distance = before * (before / now).log() + (1 - before) * ((1 - before) / (1 - now)).log()
    too_likely = (advantage > 0) & (now > before) & (distance > s["clip_high"])
    too_rare = (advantage < 0) & (now < before) & (distance > s["clip_low"])
    weight = (new - row["rollout"]).exp().clamp(max=s["ratio_cap"])
    return torch.where(too_likely | too_rare, 0.0, -advantage * weight * row["new"])


def clipped_ratio(row, s):
    log_ratio, advantage = row["new"] - row["old"], row["advantages"]
    if s["ratio"] == "answer":
        log_ratio = log_ratio.mean().expand(len(log_ratio))
    ratio = log_ratio.exp()
    bounded = ratio.clamp(1 - s["clip_low"], 1 + s["clip_high"])
    loss = torch.maximum(-advantage * ratio, -advantage * bounded)
    if s["dual_clip"] > 0:
        loss = torch.where(advantage < 0, torch.minimum(loss, -advantage * s["dual_clip"]), loss)
    return loss


SURROGATES = {"token": clipped_ratio, "answer": clipped_ratio, "weight": weighted_logprob, "mask": masked_logprob}


def policy_loss(rows, s, max_new_tokens):
    surrogates, penalties, entropies = [], [], []
    for row in (row for row in rows if counts(row, s)):
        loss = SURROGATES[s["ratio"]](row, s)
        if s["importance"] != "off":
            loss = loss * importance_weights(row, s)
        surrogates.append(loss)
        entropies.append(row["entropies"])
        if s["kl_coefficient"] > 0 and s["kl_place"] == "loss":
            penalties.append(divergence(row["new"] - row["reference"], s["kl_kind"]))
    one = lambda losses: aggregate(losses, s["aggregation"], max_new_tokens)
    loss = one(surrogates) - s["entropy_coefficient"] * one(entropies)
    return loss + s["kl_coefficient"] * one(penalties) if penalties else loss


def token_rewards(row, s):
    """The reward on the last token, less the penalty for leaving the reference on every one."""
    rewards = torch.zeros(len(row["tokens"]), dtype=torch.float64)
    rewards[-1] = row["reward"]
    if s["kl_coefficient"] > 0 and s["kl_place"] == "reward":
        rewards -= s["kl_coefficient"] * divergence(row["old"] - row["reference"], s["kl_kind"])
    return rewards


def set_advantages(rows, s):
    """Gives every answer of a step its `advantages` and, with a critic, its `returns`."""
    for row in rows:
        row["rewards"] = token_rewards(row, s)
    for group in by_group(rows):
        totals = torch.stack([row["rewards"].sum() for row in group])
        for i, row in enumerate(group):
            row["advantages"] = group_weight([r["label"] for r in group], s) * advantages(row, i, totals, s)
            if s["advantage"] == "gae":
                row["returns"] = row["advantages"] + row["values"]
    if s["whiten"]:
        every = torch.cat([row["advantages"] for row in rows if counts(row, s)])
        for row in rows:
            row["advantages"] = (row["advantages"] - every.mean()) / (every.var() + 1e-8).sqrt()


def group_weight(labels, s):
    p = sum(labels) / len(labels)
    if s["advantage"] != "weighted_leave_one_out" or s["pass_exponent"] == s["fail_exponent"] == 0:
        return 1.0
    return p ** -s["pass_exponent"] * (1 - p) ** -s["fail_exponent"] if 0 < p < 1 else 0.0


def advantages(row, i, totals, s):
    """Those of the `i`-th answer of a group with these rewards, one a token, before whitening."""
    rewards, length = row["rewards"], len(row["tokens"])
    if s["advantage"] == "returns":
        discounts = s["gamma"] ** torch.arange(length, dtype=torch.float64)
        return torch.stack([(discounts[: length - t] * rewards[t:]).sum() for t in range(length)])
    if s["advantage"] == "gae":
        values = torch.cat([row["values"], torch.zeros(1, dtype=torch.float64)])
        surprises = rewards + s["gamma"] * values[1:] - values[:-1]
        decay = (s["gamma"] * s["lambda"]) ** torch.arange(length, dtype=torch.float64)
        return torch.stack([(decay[: length - t] * surprises[t:]).sum() for t in range(length)])
    if s["advantage"] in ("leave_one_out", "weighted_leave_one_out"):
        baseline = (totals.sum() - totals[i]) / (len(totals) - 1)
    else:
        baseline = totals.mean()
    scale = totals.std() + 1e-6 if s["advantage"] == "standardised" else 1.0
    if s["advantage"] == "over_mean":
        scale = baseline if baseline > 0 else float("inf")
    return ((totals[i] - baseline) / scale).expand(length)


def value_loss(rows, new_values, s):
    """Mean over answers of the mean over their tokens of the clipped squared error of the critic."""
    losses = []
    for row, new in zip(rows, new_values):
        if counts(row, s):
            held = row["values"] + (new - row["values"]).clamp(-s["value_clip"], s["value_clip"])
            losses.append(torch.maximum((new - row["returns"]) ** 2, (held - row["returns"]) ** 2))
    return aggregate(losses, "seq_mean_token_mean", None)
