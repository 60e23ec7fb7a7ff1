"""Which words in backticks in the docstrings of the house are names of nothing.

A word is good if it is
- bound in the function or class that the docstring belongs to, or at the top of its file: a
  parameter, a variable, an attribute, a definition, an import;
- a string of the code of that file, or made by one of its f-strings, such as the name of a file
  that it writes; or a string of the files that hold the settings: the value of a setting;
- the name of a file beside it or of a script, a dotted name that leads from `hanorec` to something,
  or a definition that stands once in the whole house, so that a search finds the one place;
- flags that exist, behind a script or a module that exists, or a file of the repository;
- an expression of such names.
A word that only other files define, in two places, is none of these: whose is it?
"""

import ast
import builtins
import re
from collections import Counter
from pathlib import Path, PurePosixPath

from hanorec.studies.structure import module_name

ROOT = Path(__file__).parent.parent
IN_BACKTICKS = re.compile(r"(?<!`)`([^`]+)`(?!`)")
MODULE = re.compile(r"python -m hanorec[.\w]*")  # in the lines of a usage, without backticks
DEFINITION = ast.FunctionDef | ast.ClassDef
DOCUMENTED = ast.Module | DEFINITION


def bound(tree):
    """What a piece of code binds or takes, at any depth."""
    names = set()
    for node in ast.walk(tree):
        if isinstance(node, DEFINITION):
            names.add(node.name)
        elif isinstance(node, ast.arg):
            names.add(node.arg)
        elif isinstance(node, ast.alias):
            names.add(node.asname or node.name.partition(".")[0])
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            names.add(node.id)
        elif isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store):
            names.add(node.attr)
    return names


def top(tree):
    """What a file binds at its top."""
    names = set()
    for node in tree.body:
        names |= {node.name} if isinstance(node, DEFINITION) else bound(node)
    return names


def strings(tree):
    """The strings of the code, docstrings left out."""
    about = set()
    for node in ast.walk(tree):
        first = node.body[0] if isinstance(node, DOCUMENTED) and node.body else None
        if isinstance(first, ast.Expr):
            about.add(first.value)
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and node not in about:
            found.add(node.value)
    return found


def patterns(tree):
    """What the f-strings that begin with three letters or more can become."""
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.JoinedStr) and isinstance(node.values[0], ast.Constant):
            texts = [getattr(part, "value", None) for part in node.values]
            if len(texts[0]) >= 3:
                found.add("".join(re.escape(t) if isinstance(t, str) else ".+" for t in texts))
    return found


class House:
    """All files, parsed: files is path -> text."""

    def __init__(self, files):
        self.trees = {path: ast.parse(text) for path, text in files.items()}
        self.path_of = {module_name(path): path for path in files}
        self.strings = {path: strings(tree) for path, tree in self.trees.items()}
        self.patterns = {path: patterns(tree) for path, tree in self.trees.items()}
        self.flags = set()
        self.definitions = Counter()
        self.settings = set()  # strings of the files that hold settings: their values
        for path, tree in self.trees.items():
            self.flags |= {text[2:] for text in self.strings[path] if text.startswith("--")}
            if PurePosixPath(path).name.startswith("config"):
                self.flags |= {name.replace("_", "-") for name in bound(tree)}
                self.settings |= self.strings[path]
            for node in ast.walk(tree):
                if isinstance(node, DEFINITION):
                    self.definitions[node.name] += 1

    def class_has(self, name, attribute):
        """Whether some class of this name binds the attribute."""
        for tree in self.trees.values():
            for node in ast.walk(tree):
                if isinstance(node, ast.ClassDef) and node.name == name:
                    return attribute in bound(node)
        return True  # not ours: nothing to say

    def leads_somewhere(self, dotted):
        """hanorec.a.b.NAME.attribute, from a file on."""
        parts = dotted.split(".")
        for cut in range(len(parts), 0, -1):
            path = self.path_of.get(".".join(parts[:cut]))
            if path is not None:
                rest = parts[cut:]
                if rest and rest[0] not in top(self.trees[path]):
                    return False
                return len(rest) < 2 or self.class_has(rest[0], rest[1])
        return False

    def known(self, dotted, path, near):
        """Whether a name, dotted or not, means something where the names `near` are bound."""
        first, _, rest = dotted.partition(".")
        beside = str(PurePosixPath(path).parent / f"{first}.py")
        if first == "hanorec":
            return self.leads_somewhere(dotted)
        if first in near or hasattr(builtins, first) or self.definitions[first] == 1:
            return not rest or self.class_has(first, rest.partition(".")[0])
        return not rest and (beside in self.trees or first in self.path_of)

    def good(self, word, path, near):
        """Whether a word in backticks is a name in this file."""
        if word in self.strings[path] | self.settings:
            return True
        if any(re.fullmatch(pattern, word) for pattern in self.patterns[path]):
            return True
        if "--" in word or re.match(r"python |\S+\.py ", word):
            return self.good_command(word, path)
        if "/" in word or word.endswith((".py", ".md")):
            return (ROOT / word).exists()
        try:
            expression = ast.parse(word, mode="eval")
        except SyntaxError:
            return False
        if re.fullmatch(r"[\w.]+", word):
            return self.known(word, path, near)
        # Of a call the function alone: its arguments may be what the words say that they are.
        part = expression.body.func if isinstance(expression.body, ast.Call) else expression
        names = {node.id for node in ast.walk(part) if isinstance(node, ast.Name)}
        return all(self.known(name, path, near) for name in names)

    def good_command(self, word, path):
        """`python -m MODULE --flag value`, or the end of such a command."""
        values = self.settings | self.strings[path] | {"true", "false"}
        before = ""
        for part in word.split():
            if before == "-m" and part not in self.path_of:
                return False
            if part.endswith(".py") and not (ROOT / part).exists():
                return False
            if part.startswith("--") and part[2:] not in self.flags:
                return False
            value = before.startswith("--") and re.fullmatch(r"[a-z_|]+", part)
            if value and not set(part.split("|")) <= values:
                return False
            before = part
        return True

    def strangers(self):
        """path:line: word, for all that is no name where it stands."""
        found = []
        for path, tree in self.trees.items():
            above = top(tree)
            for node in ast.walk(tree):
                if isinstance(node, ast.ClassDef):
                    above |= bound(node)
            for node in ast.walk(tree):
                if not isinstance(node, DOCUMENTED):
                    continue
                near = above | (set() if isinstance(node, ast.Module) else bound(node))
                about = ast.get_docstring(node) or ""
                for word in IN_BACKTICKS.findall(about) + MODULE.findall(about):
                    if not self.good(" ".join(word.split()), path, near):
                        found.append(f"{path}:{getattr(node, 'lineno', 1)}: `{word}`")
        return found
