"""Reinforced Token Optimization (Zhong et al., ICML 2025, arXiv:2404.18922)."""
