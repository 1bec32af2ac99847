"""The recipe of `assets/demo-moe`: text, tokenizer, training, evaluation. `python -m assets.demo_recipe` runs it all.

All text is the project's own: facts and phrases in the TOML files beside this one, sums and stories generated.
The application never imports this package; it needs nothing but the packages of `requirements.txt`.
"""
