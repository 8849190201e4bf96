"""What must hold after the rewrite; a violation is a bug of ours, found at the pass's own door."""

from __future__ import annotations

from torch.fx import GraphModule

from kvc_compile.lowering.checks import check_not_round
from kvc_compile.plan import Plan


def verify(gm: GraphModule, plan: Plan) -> None:
    """Every planned attention is gone and its cache tensors have no reader or writer but kvc:: operators."""
    gm.graph.lint()
    names = {n.name: n for n in gm.graph.nodes}
    expected = [e for e in plan.planned if e.site.key.kind != "fresh"]
    for e in expected:
        if e.site.node in names and e.site.pattern != "read back":
            raise AssertionError(f"attention {e.site.node} is still in the graph")
        for cache in (e.site.key, e.site.value):
            node = names.get(cache.buffer)
            if cache.kind in ("born", "grown"):
                if e.site.pattern == "read back":
                    continue  # a temporary now
                if node is not None:
                    raise AssertionError(f"{cache.buffer} should be gone")
                continue
            for user in node.users if node is not None else ():
                ours = getattr(user.target, "namespace", "") == "kvc" or user.target is check_not_round
                if not ours and user.op != "output":
                    raise AssertionError(f"{cache.buffer} is still used by {user.target}")
