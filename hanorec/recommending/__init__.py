"""Lists of recommendations, for users of a data folder and for anybody with a history.

Who: `people`. Which items are looked at: `retrieval`, with its `fold_in`. In what order, and the
class to call from Python: `recommender`. Where the lists go: `output`. Settings: `config`. Its
command: `python -m hanorec.recommend`.
"""
