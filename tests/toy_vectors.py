"""A small native folder for recommenders without a language model: users walk round a ring of
items, so that the next item follows from the last one and from nothing else.
"""

ITEMS, USERS, WALK = 40, 18, 7  # items of train; then one of val, two of test


def walk(user):
    """Ten items, one after the other round the ring, from a start of the user's own."""
    return [(9 * user + step) % ITEMS for step in range(WALK + 3)]


def walks():
    """User -> {split: items}."""
    found = {}
    for user in range(USERS):
        items = walk(user)
        found[f"u{user}"] = {
            "train": items[:WALK], "val": items[WALK : WALK + 1], "test": items[WALK + 1 :]
        }
    return found


def write_folder(folder, users=None, items=ITEMS):
    folder.mkdir(parents=True)
    titles = ["item,title", *(f"i{item},Title {item}" for item in range(items))]
    (folder / "Ring_titles.csv").write_text("\n".join(titles) + "\n")
    for split in ("train", "val", "test"):
        lines = []
        for user, splits in (users or walks()).items():
            if splits.get(split):
                ids = " ".join(f"i{item}" for item in splits[split])
                lines.append(f"{user}\t{ids}\n")
        (folder / f"{split}.tsv").write_text("".join(lines))
    return folder
