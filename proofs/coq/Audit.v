(** What the theorems rest on, printed: check.sh compares it with axioms.txt. *)
From Fullgrad Require Import Composition Operations Certificate Meanings Integrals Negative.
Print Assumptions reverse_is_transpose.
Print Assumptions composition.
Print Assumptions euler.
Print Assumptions check_sound.
Print Assumptions block_complete.
Print Assumptions homogeneous_means.
Print Assumptions average_of_power.
Print Assumptions softmax_has_no_degree.
