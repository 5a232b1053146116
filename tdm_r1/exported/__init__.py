"""Exported models as the Engine runs them; `tdm_r1.export` makes them."""
