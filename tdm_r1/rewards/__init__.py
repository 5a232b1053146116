"""What the generator is trained towards: one number per picture, larger is better."""

from tdm_r1.rewards.base import Reward, WeightedSum, load_reward, score

__all__ = ["Reward", "WeightedSum", "load_reward", "score"]
