"""Whether a result is as good as its source on the same rows, and what compression broke; numpy and scipy only.

`compare_answers` counts right and wrong answers (`proportions`), or draws the units anew for any other metric
(`draws`). From either come the interval of the change (`paired_difference`), the verdict at a margin
(`non_inferiority`) and its power (`find_power`).
"""
