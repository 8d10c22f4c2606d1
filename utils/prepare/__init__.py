"""Converts data sets as their authors release them into what the stages read. Run: python -m utils.prepare --help"""
