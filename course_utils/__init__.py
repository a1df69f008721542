"""The engine of the course: what the lessons build, kept. Read `schedules`, `validity` and `pipeline` first.

Nothing is imported here, so that `import course_utils.schedules` does not load torch.
"""
