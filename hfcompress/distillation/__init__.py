"""Knowledge distillation: students, teachers, losses, the cache of a teacher's answers, augmentation."""
