"""The same comparisons with the papers' formulas, on queries, keys and values of SmolLM2 reading real text."""

from __future__ import annotations

import inspect
from pydoc_data.topics import topics

import pytest
import test_keep_merging
import test_keep_papers
import test_select
import torch

from kvc_compile.kernels.select.selection import attention

TOKENS = 512
LAYERS = (0, 7, 14, 22, 29)


@pytest.fixture(scope="module")
def reading(smollm2):
    """q, k, v of every layer, [1, heads, TOKENS, 64], as its attention sees them: after the rotary embedding."""
    from transformers import AttentionInterface
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    model, tokenizer = smollm2
    seen = []

    def capture(module, q, k, v, *args, **kwargs):
        seen.append(tuple(x.detach().clone() for x in (q, k, v)))
        return sdpa_attention_forward(module, q, k, v, *args, **kwargs)

    AttentionInterface.register("capture", capture)
    before = model.config._attn_implementation
    text = topics["attribute-access"] + topics["compound"]
    ids = tokenizer(text, return_tensors="pt").input_ids[:, :TOKENS]
    assert ids.shape[1] == TOKENS
    try:
        model.set_attn_implementation("capture")
        with torch.no_grad():
            model(ids, use_cache=False)
    finally:
        model.set_attn_implementation(before)
    found = [seen[i] for i in LAYERS]
    seen.clear()  # what is registered lives as long as the process
    return found


def data_of(reading, layers, dtype):
    q, k, v = ([reading[i][x].to(dtype) for i in range(layers)] for x in range(3))
    return test_keep_papers.Data(q, k, v, torch.ones(1, TOKENS, dtype=torch.bool), (TOKENS,))


def on(reading, monkeypatch, module):
    """Lets the tests of a module run on what the model read."""

    def real(seed=0, layers=1, lengths=None, dtype=torch.float64, **_):
        data = data_of(reading[seed % 2 :], layers, dtype)
        data.q, data.k, data.v = ([x.clone() for x in xs] for xs in (data.q, data.k, data.v))
        return data

    for name, value in (("random_data", real), ("LENGTHS", (TOKENS,)), ("GROUPS", 3), ("WIDTH", 64), ("SCALE", 0.125)):
        if hasattr(module, name):
            monkeypatch.setattr(module, name, value)


@pytest.mark.slow
@pytest.mark.parametrize("name", test_keep_papers.SIMPLE)
def test_keeps_what_the_paper_keeps(name, reading, monkeypatch):
    on(reading, monkeypatch, test_keep_papers)
    test_keep_papers.test_keeps_what_the_paper_keeps(name)
    if name in ("h2o", "snapkv-max", "snapkv-avg", "adakv", "kvzip-score"):
        test_keep_papers.test_in_single_precision(name)


BUDGETS = [
    (test_keep_papers.test_keyformer, ()),
    (test_keep_papers.test_zipcache_probes, ()),
    (test_keep_papers.test_zipvl_mass, ()),
    (test_keep_papers.test_prefixkv_mass, ()),
    (test_keep_papers.test_dynamickv, (10,)),
    (test_keep_papers.test_kvzip_over_the_model, ()),
    (test_keep_papers.test_headkv_table, ()),
    (test_keep_papers.test_d2o_layers, ()),
    (test_keep_papers.test_layers_reuse_the_first_of_a_group, ()),
    (test_keep_papers.test_spatten_adds_up_layers, ()),
]
MERGES = [
    (test_keep_merging.test_lookm_averaged, (0.3,)),
    (test_keep_merging.test_lookm_pivotal, ()),
    (test_keep_merging.test_d2o, ()),
    (test_keep_merging.test_elastic_cache, ()),
]
SELECTIONS = [
    (test_select.test_tidaldecode, ("max",)),
    (test_select.test_double_sparsity, ("1/16",)),
    (test_select.test_hata, ("sum", False)),
    (test_select.test_shadowkv, (2,)),
    (test_select.test_quest, ()),
    (test_select.test_quest_bounds_every_logit_of_a_page, ()),
]


@pytest.mark.slow
@pytest.mark.parametrize(("test", "arguments"), BUDGETS + MERGES + SELECTIONS, ids=lambda x: getattr(x, "__name__", ""))
def test_on_real_text(test, arguments, reading, monkeypatch):
    on(reading, monkeypatch, inspect.getmodule(test))
    if inspect.getmodule(test) is test_keep_merging:
        monkeypatch.setattr(test_keep_papers, "LENGTHS", (TOKENS,))
    test(*arguments)


@pytest.mark.slow
def test_a_budget_of_the_whole_prompt_changes_nothing(reading):
    data = data_of(reading, 2, torch.float32)
    rule, regions = test_keep_papers.rule_of(
        {"tokens": {"sink": 4, "recent": 32}, "keep": {"budget": TOKENS, "score": test_keep_papers.SUM}}
    )
    for layer, out in enumerate(test_keep_papers.apply(rule, regions, data.attentions, data.v)):
        q, k, v = (x[layer] for x in (data.q, data.k, data.v))
        o, _ = attention(q[:, :, -1:], k, v, out.kept, 0.125)
        want = torch.nn.functional.scaled_dot_product_attention(q[:, :, -1:], k, v, scale=0.125, enable_gqa=True)
        torch.testing.assert_close(o, want)
