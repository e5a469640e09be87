"""Policies that choose λ: the protocol, the reference policies, and how to name them."""

from unlearn_gym.policies.base import FunctionPolicy, LambdaPolicy, PolicyContext, Transition
from unlearn_gym.policies.own import blaming
from unlearn_gym.policies.registry import USAGE, existing_sources, make_policy, policy_sources, split_name

__all__ = [
    "USAGE",
    "FunctionPolicy",
    "LambdaPolicy",
    "PolicyContext",
    "Transition",
    "blaming",
    "existing_sources",
    "make_policy",
    "policy_sources",
    "split_name",
]
