"""The study: does a student with MGD learn better features than the same student alone?

Shape letters: H height, W width of a picture.

Terms:
    form        a YAML file of sets, seeds and options: the networks to train
    set         a folder of images, such as mnist: train/ and val/, with a folder for each class
    arm         a kind of network, such as the student with MGD, with a unit for each seed
    unit        one network of a set, arm and seed, with one record
    alone       the arm of the student without a teacher
    guided      with a teacher
    question    a choice of MGD, with an arm for each answer
    lead        the mean of an arm minus that of another, in points
    spread      the standard deviation over seeds, which a lead must exceed to count
    condition   a requirement of a valid comparison
    claim       MGD beats the student alone, and a random matching does not
"""
