"""What `keep` and `select` of a spec say, resolved to numbers: the form in which kernels read it. Needs no torch.

Read from the plain data of an expanded spec (`Spec.expanded()`), which has been checked; what has no reference
semantics yet raises `Unbuilt`.
"""

from .amount import Amount, Unbuilt
from .heads import HeadGroup, groups_of
from .policy import Policy, key_of, unbuilt, words_of
from .query import Index, Query, query_of
from .room import capacity, larger
from .rule import Alloc, Budget, Diverse, Fold, Merge, Regions, Rule, regions_of, rules_of
from .score import AttentionScore, GraphDecay, Probe, Score, score_of
from .selection import Selection

__all__ = [
    "Alloc",
    "Amount",
    "AttentionScore",
    "Budget",
    "Diverse",
    "Fold",
    "GraphDecay",
    "HeadGroup",
    "Index",
    "Merge",
    "Policy",
    "Probe",
    "Query",
    "Regions",
    "Rule",
    "Score",
    "Selection",
    "Unbuilt",
    "capacity",
    "groups_of",
    "key_of",
    "larger",
    "query_of",
    "regions_of",
    "rules_of",
    "score_of",
    "unbuilt",
    "words_of",
]
