from __future__ import annotations


class Trail:
    def __init__(self, request, gm, plan):
        pass

    def rewritten(self, gm):
        pass
