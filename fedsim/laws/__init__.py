"""The laws of every kind of plug-in: what it keeps, whatever its method is, or says in its `exempt` why it cannot.

One file per kind, named like it, with the tuple `LAWS`; `check` holds a plug-in against those of its kind. The tests do so for
every plug-in that comes with fedsim, `fedsim check` for a user's own. Nothing is trained on real data: what plug-ins are held
against is made up (`made_up.py`), and small.
"""

from fedsim.laws.frame import Law, LawBroken, LawResult, check, check_named, hold, laws_of, strangers

__all__ = ["Law", "LawBroken", "LawResult", "check", "check_named", "hold", "laws_of", "strangers"]
