"""Lists of recommendations, for users of a data folder and for anybody with a history.

Who: `people`. Which items are looked at: `retrieval`, with its `fold_in`. In what order: `policy`.
All of it as a class to call from Python: `recommender`. Where lists go: `output`. Settings:
`config`. Their command: `python -m hanorec.recommend`.
"""
