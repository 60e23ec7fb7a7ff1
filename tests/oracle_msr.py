"""Independent oracle of MLLM-MSR's extractive form (MR-1, MR-2), in plain float64 loops.

As oracle.py: from the formulas alone, term by term; the package never imports it.
"""

import math


def words(text):
    """Runs of letters, digits and underscores, in small letters, each once, in order."""
    found, run = [], ""
    for letter in [*text.casefold(), " "]:
        if letter.isalnum() or letter == "_":
            run += letter
            continue
        if run and run not in found:
            found.append(run)
        run = ""
    return found


def cosine(a, b):
    """Of two vectors."""
    product = math.fsum(float(x) * float(y) for x, y in zip(a, b, strict=True))
    lengths = [math.sqrt(math.fsum(float(x) ** 2 for x in v)) for v in (a, b)]
    return product / (lengths[0] * lengths[1])


def nearest_words(image, vectors, m):
    """Oracle of MR-1: the numbers of the m word vectors with the highest cosine with the image's,
    highest first, of equal ones the first."""
    left, chosen = list(range(len(vectors))), []
    while left and len(chosen) < m:
        best = left[0]
        for x in left[1:]:
            if cosine(vectors[x], image) > cosine(vectors[best], image):
                best = x
        chosen.append(best)
        left.remove(best)
    return chosen


def weights(history, carried, a):
    """Oracle of MR-2, extractive: w_K(x) = sum over k of a^(K - k) n_k(x), the recurrence written
    out. carried: item -> its words."""
    blocks = []
    for place, item in enumerate(history):
        if place % 3 == 0:
            blocks.append([])
        blocks[-1].append(item)
    found = {}
    for k, block in enumerate(blocks):
        age = len(blocks) - 1 - k
        for item in block:
            for x in set(carried[item]):
                found[x] = found.get(x, 0.0) + (1.0 if age == 0 else float(a) ** age)
    return {x: w for x, w in found.items() if w != 0}


def heaviest(found, q):
    """The q words of the greatest weight, equal ones by alphabet."""
    chosen = []
    for x in sorted(found):
        place = 0
        while place < len(chosen) and found[chosen[place]] >= found[x]:
            place += 1
        chosen.insert(place, x)
    return chosen[:q]
