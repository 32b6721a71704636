"""Recipes that come with fwdlearn; `fwdlearn ls` names them."""

if __name__ == "recipes":
    raise ImportError("import fwdlearn.recipes: under its bare name it would exist twice")
