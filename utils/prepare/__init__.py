"""Data in: from what the authors of data sets hand out to what the stages read. Run: python -m utils.prepare --help"""
