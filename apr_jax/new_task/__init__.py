"""`apr new`: the files with which a task of one's own begins.

my_task          a task that adds up numbers, with serial and parallel demonstrations
my_task_config   an experiment on it
test_my_task     what the task promises, as a test
write            writes them under the user's own name, in place of `my_task` and `MyTask`
"""
