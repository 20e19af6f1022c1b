# SPDX-License-Identifier: Apache-2.0
# Copyright 2026 The jtok_jax authors
"""A slow numpy model, float64 in and out, to test the real one: loops, from the equations.

"Eq. n" is equation n of arXiv 2602.00800. Array names end in the letters of their axes:
    B sequences         T tokens of one sequence (or all B*T in the balance terms)
    D model width       N query heads           K key/value heads       H head width
    F ffn width         S shared-expert width   E experts               k chosen ones
    M token tables per layer (n_e)              V vocabulary            L layers
"""

import math

import numpy as np


def sigmoid(z):
    """Returns 1 / (1 + exp(-z)) of a number, without overflow."""
    if z >= 0:
        return 1.0 / (1.0 + math.exp(-z))
    return math.exp(z) / (1.0 + math.exp(z))


def softmax(z_E):
    """Returns exp(z) / sum(exp(z)) of a vector."""
    exp_E = np.exp(z_E - np.max(z_E))
    return exp_E / np.sum(exp_E)


def logsumexp(z_V):
    """Returns log(sum(exp(z))) of a vector."""
    top = np.max(z_V)
    return float(top + np.log(np.sum(np.exp(z_V - top))))


def top_indices(z_E, top_k):
    """Returns the indices of the top_k largest entries, largest first, ties by lower index."""
    if not 1 <= top_k <= len(z_E):
        raise ValueError(f"top_k {top_k} of {len(z_E)}")
    chosen = []
    for _ in range(top_k):
        best = None
        for i in range(len(z_E)):
            if i not in chosen and (best is None or z_E[i] > z_E[best]):
                best = i
        chosen.append(best)
    return np.array(chosen, dtype=np.int64)


def rms_norm(x_D, weight, eps):
    """Returns x / sqrt(mean(x^2) + eps) over the last axis, times weight unless that is None."""
    x_D = np.asarray(x_D, dtype=np.float64)
    y_D = x_D * (1.0 / np.sqrt(np.mean(x_D**2, axis=-1, keepdims=True) + eps))
    return y_D if weight is None else y_D * np.asarray(weight, dtype=np.float64)


def rope(x_H, position, base):
    """Returns one head vector rotated by its position, its two halves forming the pairs."""
    half = len(x_H) // 2
    y_H = np.zeros(2 * half)
    for i in range(half):
        angle = position * base ** (-2.0 * i / len(x_H))
        cos, sin = math.cos(angle), math.sin(angle)
        first, second = x_H[i], x_H[half + i]
        y_H[i] = first * cos - second * sin
        y_H[half + i] = second * cos + first * sin
    return y_H


def attention(
    x_TD,
    *,
    query_DNH,
    key_DKH,
    value_DKH,
    out_NHD,
    query_norm_H=None,
    key_norm_H=None,
    norm_eps,
    rope_base,
):
    """Returns causal grouped-query attention over one sequence at positions 0..T-1."""
    length = len(x_TD)
    _, heads, width = query_DNH.shape
    kv_heads = key_DKH.shape[1]

    def project(position, weight_DH, norm_H):
        head_H = x_TD[position] @ weight_DH
        if norm_H is not None:
            head_H = rms_norm(head_H, norm_H, norm_eps)
        return rope(head_H, position, rope_base)

    y_TD = np.zeros(x_TD.shape)
    for n in range(heads):
        kv = n // (heads // kv_heads)
        for t in range(length):
            query_H = project(t, query_DNH[:, n, :], query_norm_H)
            scores = np.zeros(t + 1)
            for s in range(t + 1):
                key_H = project(s, key_DKH[:, kv, :], key_norm_H)
                scores[s] = query_H @ key_H / math.sqrt(width)
            probs = softmax(scores)
            mixed_H = np.zeros(width)
            for s in range(t + 1):
                mixed_H += probs[s] * (x_TD[s] @ value_DKH[:, kv, :])
            y_TD[t] += mixed_H @ out_NHD[n]
    return y_TD


def swiglu(x_D, *, gate_DF, up_DF, down_FD):
    """Returns (silu(x gate) * (x up)) down of one token."""
    gate_F, up_F = x_D @ gate_DF, x_D @ up_DF
    hidden_F = np.array([g * sigmoid(g) * u for g, u in zip(gate_F, up_F, strict=True)])
    return hidden_F @ down_FD


def moe(x_TD, *, router_DE, gate_EDF, up_EDF, down_EFD, shared, top_k, renormalize):
    """Returns the mixture-of-experts output, the router's probabilities and its choices."""
    out_TD, probs_TE, choice_Tk = [], [], []
    for x_D in x_TD:
        probs_E = softmax(x_D @ router_DE)
        choice_k = top_indices(probs_E, top_k)
        total = sum(probs_E[e] for e in choice_k) if renormalize else 1.0
        out_D = np.zeros(len(x_D))
        for e in choice_k:
            expert_D = swiglu(x_D, gate_DF=gate_EDF[e], up_DF=up_EDF[e], down_FD=down_EFD[e])
            out_D += probs_E[e] / total * expert_D
        if shared is not None:
            out_D += swiglu(x_D, gate_DF=shared["gate"], up_DF=shared["up"], down_FD=shared["down"])
        out_TD.append(out_D)
        probs_TE.append(probs_E)
        choice_Tk.append(choice_k)
    return np.array(out_TD), np.array(probs_TE), np.array(choice_Tk)


def balance_loss(probs_TE, choice_Tk):
    """Returns E * sum_e f_e P_e, f_e the share of choices and P_e the mean probability of e."""
    tokens, experts = probs_TE.shape
    total = 0.0
    for e in range(experts):
        count = sum(int(chosen == e) for choice_k in choice_Tk for chosen in choice_k)
        prob = sum(probs_TE[t, e] for t in range(tokens))
        total += count / (tokens * choice_Tk.shape[1]) * (prob / tokens)
    return float(experts * total)


def norm_eps(e_D, *, kind, eps):
    """Returns Norm_eps of Eq. 7 and 12: e over its L2 norm ('l2') or RMS ('rms') plus eps."""
    if kind == "l2":
        return e_D / (math.sqrt(np.sum(e_D**2)) + eps)
    if kind == "rms":
        return e_D / (math.sqrt(np.mean(e_D**2)) + eps)
    raise ValueError(f"norm {kind!r}")


def jtok_gate(dm_D, row_D, scale_D, *, norm, eps):
    """Returns the gated ffn increment of Eq. 7-8: dm * (1 + scale * Norm_eps(row))."""
    return dm_D * (1.0 + scale_D * norm_eps(row_D, kind=norm, eps=eps))


def jtok_m_route(x_D, router_DM, bias_M, top_k):
    """Returns Eq. 10's top-k choice, its sigmoid weights of sum 1, and the sigmoid of all M."""
    logits_M = x_D @ router_DM + (0.0 if bias_M is None else bias_M)
    choice_k = top_indices(logits_M, top_k)
    sigmoid_M = np.array([sigmoid(g) for g in logits_M])
    total = sum(sigmoid_M[i] for i in choice_k)
    weights_k = np.array([sigmoid_M[i] / total for i in choice_k])
    return choice_k, weights_k, sigmoid_M


def jtok_m_delta(rows_MD, choice_k, weights_k, scale_D, *, num_layers, norm, eps):
    """Returns the increment dr of Eq. 11-12 for one token, num_layers being the backbone's."""
    e_D = np.zeros(rows_MD.shape[1])
    for i, weight in zip(choice_k, weights_k, strict=True):
        e_D += weight * rows_MD[i]
    return scale_D * norm_eps(e_D, kind=norm, eps=eps) / math.sqrt(2.0 * num_layers)


def modulator_balance(sigmoid_TM, choice_Tk, *, probability):
    """Returns n_e * sum_i p_i f_i (load balance, App. B), with raw or normalized sigmoids."""
    if probability not in ("sigmoid", "normalized"):
        raise ValueError(f"probability {probability!r}")
    if probability == "normalized":
        sigmoid_TM = np.array([sigmoid_M / np.sum(sigmoid_M) for sigmoid_M in sigmoid_TM])
    return balance_loss(sigmoid_TM, choice_Tk)


def run_attention(x_TD, weights, spec):
    """Returns the attention of one layer, given that layer's weights by name."""
    use_norm = {"none": False, "rms": True}[spec["qk_norm"]]
    return attention(
        x_TD,
        query_DNH=weights["attention/query"],
        key_DKH=weights["attention/key"],
        value_DKH=weights["attention/value"],
        out_NHD=weights["attention/out"],
        query_norm_H=weights["attention/query_norm"] if use_norm else None,
        key_norm_H=weights["attention/key_norm"] if use_norm else None,
        norm_eps=spec["norm_eps"],
        rope_base=spec["rope_base"],
    )


def run_ffn(x_TD, weights, spec):
    """Returns the ffn or MoE increment of one layer, and the MoE's (probs, choice) or None."""
    if spec["moe_top_k"] == 0:
        names = {"gate_DF": "ffn/gate", "up_DF": "ffn/up", "down_FD": "ffn/down"}
        dense = {argument: weights[name] for argument, name in names.items()}
        return np.array([swiglu(x_D, **dense) for x_D in x_TD]), None
    shared = None
    if "moe/shared_gate" in weights:
        shared = {name: weights[f"moe/shared_{name}"] for name in ("gate", "up", "down")}
    out_TD, probs_TE, choice_Tk = moe(
        x_TD,
        router_DE=weights["moe/router"],
        gate_EDF=weights["moe/gate"],
        up_EDF=weights["moe/up"],
        down_EFD=weights["moe/down"],
        shared=shared,
        top_k=spec["moe_top_k"],
        renormalize=spec["moe_renormalize"],
    )
    return out_TD, (probs_TE, choice_Tk)


def router_input(h_TD, mid_TD, weights, spec):
    """Returns what the JTok-M router reads: RMSNorm of the layer's input (Eq. 10) or of h~."""
    ffn_norm = "moe/norm" if spec["moe_top_k"] else "ffn/norm"
    if spec["jtok_router_input"] not in ("pre_attention", "post_attention"):
        raise ValueError(f"jtok_router_input {spec['jtok_router_input']!r}")
    early = spec["jtok_router_input"] == "pre_attention"
    x_TD, shared = (h_TD, "attention/norm") if early else (mid_TD, ffn_norm)
    name_of = {"shared": shared, "own": "jtok/router_norm", "weightless": None}
    name = name_of[spec["jtok_router_norm"]]
    return rms_norm(x_TD, None if name is None else weights[name], spec["norm_eps"])


def run_block(h_TD, ids_T, params, spec, *, layer):
    """Returns h' of one layer (Eq. 9 or 13), then the MoE's and the JTok-M router's records."""
    stacked = {name: value for name, value in params.items() if name.startswith("blocks/")}
    weights = {name.removeprefix("blocks/"): value[layer] for name, value in stacked.items()}
    normed_TD = rms_norm(h_TD, weights["attention/norm"], spec["norm_eps"])
    mid_TD = h_TD + run_attention(normed_TD, weights, spec)
    ffn_norm = "moe/norm" if spec["moe_top_k"] else "ffn/norm"
    normed_TD = rms_norm(mid_TD, weights[ffn_norm], spec["norm_eps"])
    dm_TD, moe_record = run_ffn(normed_TD, weights, spec)

    kind = spec["jtok_kind"]
    if kind not in ("none", "jtok", "jtok_m"):
        raise ValueError(f"jtok_kind {kind!r}")
    if kind == "none" or spec["jtok_table_of_layer"][layer] < 0:
        return mid_TD + dm_TD, moe_record, None

    table = params["tables"][spec["jtok_table_of_layer"][layer]]
    scale_D = weights["jtok/scale"]
    options = {"norm": spec["jtok_norm"], "eps": spec["jtok_eps"]}
    new_TD = np.zeros(h_TD.shape)
    if kind == "jtok":
        for t, token in enumerate(ids_T):
            new_TD[t] = mid_TD[t] + jtok_gate(dm_TD[t], table[token], scale_D, **options)
        return new_TD, moe_record, None

    options["num_layers"], top_k = spec["num_layers"], spec["jtok_top_k"]
    x_TD = router_input(h_TD, mid_TD, weights, spec)
    router_DM, bias_M = weights["jtok/router"], weights.get("jtok/router_bias")
    sigmoid_TM, choice_Tk = [], []
    for t, token in enumerate(ids_T):
        choice_k, weights_k, sigmoid_M = jtok_m_route(x_TD[t], router_DM, bias_M, top_k)
        dr_D = jtok_m_delta(table[:, token], choice_k, weights_k, scale_D, **options)
        new_TD[t] = mid_TD[t] + dm_TD[t] + dr_D
        sigmoid_TM.append(sigmoid_M)
        choice_Tk.append(choice_k)
    return new_TD, moe_record, (np.array(sigmoid_TM), np.array(choice_Tk))


def model_batch(params, ids_BT, spec):
    """Returns logits_BTV, and both balance terms over all B*T tokens, summed over layers."""
    params = {name: np.asarray(value, dtype=np.float64) for name, value in params.items()}
    layers = range(spec["num_layers"])
    logits_BTV = []
    records = {(name, layer): [] for name in ("moe", "jtok") for layer in layers}
    for ids_T in np.asarray(ids_BT):
        h_TD = np.array([params["embed"][token] for token in ids_T])
        for layer in layers:
            h_TD, moe_record, jtok_record = run_block(h_TD, ids_T, params, spec, layer=layer)
            records["moe", layer].append(moe_record)
            records["jtok", layer].append(jtok_record)
        h_TD = rms_norm(h_TD, params["final_norm"], spec["norm_eps"])
        head_DV = params["embed"].T if spec["tied"] else params["head"]
        logits_BTV.append(np.array([h_D @ head_DV for h_D in h_TD]))

    moe_balance, jtok_balance = 0.0, 0.0
    for (name, _), of_sequences in records.items():
        if of_sequences[0] is None:  # a layer without such a router
            continue
        probs_TE = np.concatenate([probs for probs, _ in of_sequences])
        choice_Tk = np.concatenate([choice for _, choice in of_sequences])
        if name == "moe":
            moe_balance += balance_loss(probs_TE, choice_Tk)
        else:
            probability = spec["jtok_balance_probability"]
            jtok_balance += modulator_balance(probs_TE, choice_Tk, probability=probability)
    logits_BTV = np.array(logits_BTV)
    return {"logits_BTV": logits_BTV, "moe_balance": moe_balance, "jtok_balance": jtok_balance}


def loss(params, ids_BT, targets_BT, spec, *, z_weight, moe_balance_weight, jtok_balance_weight):
    """Returns mean(-log softmax[target] + z_weight * logsumexp^2) plus weighted balance terms."""
    result = model_batch(params, ids_BT, spec)
    total, count = 0.0, 0
    for logits_TV, targets_T in zip(result["logits_BTV"], np.asarray(targets_BT), strict=True):
        for logits_V, target in zip(logits_TV, targets_T, strict=True):
            log_z = logsumexp(logits_V)
            total += log_z - logits_V[target] + z_weight * log_z**2
            count += 1
    balance = moe_balance_weight * result["moe_balance"]
    balance += jtok_balance_weight * result["jtok_balance"]
    return float(total / count + balance)


def directional_derivative(function, params, direction, step=1e-5):
    """Returns the central difference of function(params) along direction (absent names: 0)."""
    values = []
    for sign in (1.0, -1.0):
        moved = {name: np.array(value, dtype=np.float64) for name, value in params.items()}
        for name, change in direction.items():
            moved[name] = moved[name] + sign * step * np.asarray(change, dtype=np.float64)
        values.append(function(moved))
    return float((values[0] - values[1]) / (2.0 * step))
