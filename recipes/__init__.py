"""Recipes that come with fwdlearn; `fwdlearn ls` names them."""
