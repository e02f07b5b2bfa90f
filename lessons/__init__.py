"""The class kit: a lesson, exercises that check themselves, a page for the teacher."""
