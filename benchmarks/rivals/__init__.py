"""The rival methods of the library beside plain implementations of their papers.

What is compared is how accurate they are; nothing here measures time.
"""
