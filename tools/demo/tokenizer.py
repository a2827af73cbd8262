"""Byte-level byte-pair encoding: a small tokenizer that needs nothing but the standard library."""

import json
import re
from collections import Counter, defaultdict
from collections.abc import Iterable
from functools import lru_cache
from itertools import pairwise
from pathlib import Path

WORD = re.compile(r" ?[A-Za-z]+| ?[0-9]+|\n+| ?[^\sA-Za-z0-9]+|\s")


class Tokenizer:
    """Ids 0..255 are bytes; id 256 + i is the i-th merge, a pair of earlier ids."""

    def __init__(self, merges: Iterable[tuple[int, int]]):
        self.merges = [tuple(pair) for pair in merges]
        self.rank = {pair: 256 + i for i, pair in enumerate(self.merges)}
        self.bytes = [bytes([i]) for i in range(256)]
        for left, right in self.merges:
            self.bytes.append(self.bytes[left] + self.bytes[right])
        self._encode_word = lru_cache(maxsize=1 << 16)(self._merge_word)

    def __len__(self) -> int:
        return len(self.bytes)

    def _merge_word(self, word: str) -> tuple[int, ...]:
        ids = list(word.encode())
        while len(ids) > 1:
            best = min(pairwise(ids), key=lambda pair: self.rank.get(pair, len(self)))
            if best not in self.rank:
                break
            ids = replace(ids, best, self.rank[best])
        return tuple(ids)

    def encode(self, text: str) -> list[int]:
        return [i for word in WORD.findall(text) for i in self._encode_word(word)]

    def decode(self, ids: Iterable[int]) -> bytes:
        return b"".join(self.bytes[i] for i in ids)

    @classmethod
    def train(cls, text: str, size: int) -> "Tokenizer":
        """Learn size - 256 merges, the most frequent pair of neighbours first."""
        counts = Counter(WORD.findall(text))
        words = [(list(word.encode()), n) for word, n in counts.items()]
        pairs, where = Counter(), defaultdict(set)
        for w, (ids, n) in enumerate(words):
            for pair in pairwise(ids):
                pairs[pair] += n
                where[pair].add(w)
        merges = []
        for new in range(256, size):
            best = max(pairs, key=lambda pair: (pairs[pair], pair))
            merges.append(best)
            for w in list(where[best]):
                ids, n = words[w]
                for pair in pairwise(ids):
                    pairs[pair] -= n
                    where[pair].discard(w)
                ids = replace(ids, best, new)
                words[w] = (ids, n)
                for pair in pairwise(ids):
                    pairs[pair] += n
                    where[pair].add(w)
        return cls(merges)

    def save(self, path: Path) -> None:
        path.write_text(json.dumps({"type": "byte-level BPE", "merges": self.merges}) + "\n")

    @classmethod
    def load(cls, path: Path) -> "Tokenizer":
        return cls(json.loads(path.read_text())["merges"])


def replace(ids: list[int], pair: tuple[int, int], new: int) -> list[int]:
    """ids with every occurrence of pair, from the left, made one id."""
    out, i = [], 0
    while i < len(ids):
        if i + 1 < len(ids) and (ids[i], ids[i + 1]) == pair:
            out.append(new)
            i += 2
        else:
            out.append(ids[i])
            i += 1
    return out
