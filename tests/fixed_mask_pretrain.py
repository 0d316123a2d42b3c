"""main_pretrain.py with one fixed mask for every step, whatever the rank; for comparing numbers of ranks."""

import main_pretrain
from models_mixmae import MixMAE
from util.seeding import keyed_generator

draw = MixMAE.random_masking
MixMAE.random_masking = lambda self, mask_ratio, *_: draw(self, mask_ratio, keyed_generator(7))

if __name__ == "__main__":
    main_pretrain.main(main_pretrain.get_args_parser().parse_args())
