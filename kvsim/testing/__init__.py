"""For tests, ours and a plug-in author's: small traces, a slow reference cache, and `check_policy`.

`check_policy("my_policy.py")` says in words which clause of the policy contract is broken.
"""

from kvsim.testing.contract import check_policy, moved
from kvsim.testing.reference import ReferenceCache
from kvsim.testing.traces import tiny_trace

__all__ = ["ReferenceCache", "check_policy", "moved", "tiny_trace"]
