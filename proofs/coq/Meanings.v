(** What the steps of a certificate mean is met by the operators that networks have: one lemma a
    kind, and a network of all of them, at every size, weight and input. *)
From Coq Require Import List Arith Lia Lra Bool Reals QArith Qreals.
From Fullgrad Require Import Composition Operations Certificate.
Import ListNotations.
Local Open Scope R_scope.

Lemma Q2R_half : Q2R (1 # 2) = 1 / 2.
Proof. unfold Q2R. simpl. lra. Qed.

Definition one_argument (k : kind) (p : positive) (c : bool) : node :=
  Node k [Live p 1] [[(0%nat, 1%Q)]] c 1 1.

(** A step of one argument is met by  v = J u + b  with b a bias leaf, whatever J depends on. *)
Lemma one_argument_means k p c (o : opR) u :
  arity o = 1%nat ->
  (forall i, (i < dout o)%nat ->
     fwd o u i = sumR (din o 0) (fun l => J o u 0 i l * u 0%nat l)
                 + sumR (nb o) (fun l => JB o u i l * bias o l)) ->
  (c = false -> forall i, (i < dout o)%nat -> sumR (nb o) (fun l => JB o u i l * bias o l) = 0) ->
  means (one_argument k p c) o u.
Proof.
  intros Ha Hv Hc. split; [exact Ha|].
  exists (fun _ i => sumR (din o 0) (fun l => J o u 0 i l * u 0%nat l)),
         (fun i => sumR (nb o) (fun l => JB o u i l * bias o l)).
  intros i Hi. repeat split.
  - intros _. rewrite (Hv i Hi). simpl. ring.
  - intros E. now apply Hc.
  - simpl. rewrite Q2R_1. ring.
  - intros a Hlt. rewrite Ha in Hlt. destruct a; [|lia]. simpl. intros _. rewrite Q2R_1. ring.
Qed.

(** One argument, no bias: the operator is complete by itself. *)
Lemma complete_means k p (o : opR) u :
  arity o = 1%nat -> nb o = 0%nat -> complete_atR o u -> means (one_argument k p false) o u.
Proof.
  intros Ha Hb Hc. apply one_argument_means; auto.
  - intros i Hi. rewrite (Hc i Hi), Ha. simpl. ring.
  - intros _ i Hi. now rewrite Hb.
Qed.

(** Linear layers, convolutions, pooling by a mean: W and b anything. *)
Lemma linear_means p n m W b u : means (one_argument Linear p true) (affine 1 (fun _ => n) m W b) u.
Proof.
  apply one_argument_means; auto; try discriminate. intros i Hi. simpl.
  rewrite sumR_delta by auto. ring.
Qed.

(** A norm with 1/sigma held and its centring linear. *)
Lemma norm_means p n s w b u : means (one_argument Freeze p true) (layernorm n s w b) u.
Proof.
  apply one_argument_means; auto; try discriminate. intros i Hi.
  rewrite (layernorm_complete n s w b u i Hi). simpl. ring.
Qed.

(** The secant of u g(u): GELU, SiLU and their like. *)
Lemma secant_means p n g u : means (one_argument Secant p false) (gate n g) u.
Proof. apply complete_means; auto. apply gate_complete. Qed.

(** ReLU, at every point: at 0 the derivative is taken to be 0. *)
Lemma relu_means p n u : means (one_argument Homogeneous p false) (relu n) u.
Proof. apply complete_means; auto. apply relu_complete. Qed.

(** The sum of two values, a residual connection. *)
Definition sum_node (p q : positive) : node :=
  Node Linear [Live p 1; Live q 1] [[(0%nat, 1%Q)]; [(1%nat, 1%Q)]] false 1 1.
Definition sum_op (n : nat) : opR := affine 2 (fun _ => n) n (fun _ => delta) (fun _ => 0).

Lemma sum_means p q n u : means (sum_node p q) (sum_op n) u.
Proof.
  split; [reflexivity|]. exists (fun m i => u m i), (fun _ => 0). intros i Hi. simpl in *.
  repeat split.
  - intros _. rewrite !sumR_delta by auto. ring.
  - rewrite Q2R_1, sumR_delta by auto. ring.
  - intros [|[|a]] Ha; try lia; intros _; cbv beta iota delta [Nat.eqb];
      rewrite sumR_delta, ?Q2R_1, ?Q2R_0 by auto; ring.
Qed.

(** A gated product, its gradient halved. *)
Definition half_node (p q : positive) : node :=
  Node Product [Live p 1; Live q 1] [[(0%nat, 1%Q); (1%nat, 1%Q)]] false (1 # 2) 1.

Lemma half_means p q n u : means (half_node p q) (mul_half n) u.
Proof.
  split; [reflexivity|]. exists (fun _ i => u 0%nat i * u 1%nat i), (fun _ => 0).
  intros i Hi. simpl in *. repeat split.
  - intros _. ring.
  - rewrite Q2R_1. ring.
  - intros [|[|a]] Ha; try lia; intros _; cbv beta iota delta [Nat.eqb]; rewrite Q2R_1, Q2R_half.
    + rewrite (sumR_ext n _ (fun l => delta i l * (1 / 2 * u 1%nat i * u 0%nat l))) by (intros; ring).
      rewrite sumR_delta by auto. ring.
    + rewrite (sumR_ext n _ (fun l => delta i l * ((1 - 1 / 2) * u 0%nat i * u 1%nat l)))
        by (intros; ring).
      rewrite sumR_delta by auto. lra.
Qed.

(** Attention with its weights held: argument 0 is whatever they are made of, argument 1 the values;
    any number of heads and batches is a larger matrix of weights. *)
Definition attention_node (p : positive) : node :=
  Node Attention [Held; Live p 1] [[(1%nat, 1%Q)]] false 1 1.

Lemma attention_means p n0 T S d Aw u : means (attention_node p) (attention n0 T S d Aw) u.
Proof.
  split; [reflexivity|]. exists (fun _ i => fwd (attention n0 T S d Aw) u i), (fun _ => 0).
  intros i Hi. pose proof (attention_complete n0 T S d Aw u i Hi) as Hc. simpl in Hi, Hc.
  repeat split.
  - intros _. simpl. ring.
  - simpl. rewrite Q2R_1. ring.
  - intros [|[|a]] Ha; simpl in Ha; try lia; simpl.
    + apply sumR_zero. intros; ring.
    + intros _. rewrite Q2R_1, Hc. rewrite (sumR_zero n0) by (intros; ring). ring.
Qed.

(** What is homogeneous of degree k, where it is differentiable: the true gradient, by Euler. *)
Definition power_node (p : positive) (k : nat) (s : Q) : node :=
  Node Homogeneous [Live p 1] [[(0%nat, inject_Z (Z.of_nat k))]] false s (s * inject_Z (Z.of_nat k)).

Lemma homogeneous_means p k s n m (f : nat -> vecR -> R) (grad : vecR -> nat -> vecR) u :
  (forall i, (i < m)%nat -> extensional n (f i) /\ pos_hom k (f i) /\
                           is_grad n (f i) (u 0%nat) (grad (u 0%nat) i)) ->
  means (power_node p k s)
    (Composition.Op 1 (fun _ => n) m 0 (fun _ => 0) (fun u i => f i (u 0%nat))
        (fun u _ i l => Q2R s * grad (u 0%nat) i l) (fun _ _ _ => 0)) u.
Proof.
  intros H. split; [reflexivity|]. exists (fun _ i => f i (u 0%nat)), (fun _ => 0).
  intros i Hi. destruct (H i Hi) as [He [Hh Hg]]. simpl in *. repeat split.
  - intros _. ring.
  - ring.
  - intros [|a] Ha; try lia. intros _.
    rewrite (sumR_ext n _ (fun l => Q2R s * (grad (u 0%nat) i l * u 0%nat l))) by (intros; ring).
    rewrite sumR_mul_l. fold (dotR n (grad (u 0%nat) i) (u 0%nat)).
    rewrite (euler n k (f i) (u 0%nat) (grad (u 0%nat) i) He Hh Hg), Q2R_1.
    assert (Hk : Q2R (inject_Z (Z.of_nat k)) = INR k).
    { rewrite INR_IZR_INZ. unfold Q2R, inject_Z. simpl. lra. }
    cbv beta iota delta [Nat.eqb]. rewrite Hk. ring.
Qed.

(** ** A pre-norm block, for every size and weight *)
Section Block.
Variables (n h c : nat) (x : vecR) (s1 s2 : vecR -> R) (Aw : vecR -> nat -> nat -> R) (g : R -> R)
  (Wqk Wv Wg Wu Wd Wh : nat -> nat -> nat -> R) (w1 b1 w2 b2 bqk bv bg bu bd bh : vecR).
Variable T : nat. Variable d : nat. Hypothesis size : n = (T * d)%nat.

Definition block_certificate : certificate := [
  Leaf;
  Op (one_argument Freeze 1 true);     (* 1: norm *)
  Op (one_argument Linear 1 true);     (* 2: queries and keys *)
  Op (one_argument Linear 2 true);     (* 3: values *)
  Op (attention_node 1);               (* 4 *)
  Op (sum_node 5 1);                   (* 5: x + attention *)
  Op (one_argument Freeze 1 true);     (* 6: norm *)
  Op (one_argument Linear 1 true);     (* 7: gate *)
  Op (one_argument Linear 2 true);     (* 8: value *)
  Op (one_argument Secant 2 false);    (* 9: silu of the gate *)
  Op (half_node 1 2);                  (* 10 *)
  Op (one_argument Linear 1 true);     (* 11 *)
  Op (sum_node 7 1);                   (* 12 *)
  Op (one_argument Linear 1 true)].    (* 13: head *)

Definition block_network : list (instr R) := [
  Composition.Leaf n x;
  App (layernorm n s1 w1 b1) (fun _ => 0%nat);
  App (affine 1 (fun _ => n) (2 * n) Wqk bqk) (fun _ => 1%nat);
  App (affine 1 (fun _ => n) n Wv bv) (fun _ => 1%nat);
  App (attention (2 * n) T T d Aw) (fun a => match a with O => 2%nat | _ => 3%nat end);
  App (sum_op n) (fun a => match a with O => 0%nat | _ => 4%nat end);
  App (layernorm n s2 w2 b2) (fun _ => 5%nat);
  App (affine 1 (fun _ => n) h Wg bg) (fun _ => 6%nat);
  App (affine 1 (fun _ => n) h Wu bu) (fun _ => 6%nat);
  App (gate h g) (fun _ => 7%nat);
  App (mul_half h) (fun a => match a with O => 9%nat | _ => 8%nat end);
  App (affine 1 (fun _ => h) n Wd bd) (fun _ => 10%nat);
  App (sum_op n) (fun a => match a with O => 5%nat | _ => 11%nat end);
  App (affine 1 (fun _ => n) c Wh bh) (fun _ => 12%nat)].

Lemma block_is_realised : realises block_certificate block_network.
Proof.
  split; [reflexivity|]. split.
  - intros k o args Hk E a Ha.
    do 14 (destruct k as [|k]; [try discriminate; injection E as <- <-; simpl in *;
      destruct a as [|[|a]]; simpl; try lia; (split; [lia|cbn; rewrite <- ?size; auto])|]).
    simpl in Hk. lia.
  - intros k Hk.
    destruct k as [|k]; [simpl; now exists n, x|].
    do 13 (destruct k as [|k]; [eexists; eexists; split; [reflexivity|split;
      [first [apply linear_means | apply norm_means | apply secant_means | apply sum_means
             | apply half_means | apply attention_means]
      | intros a q f Ha Hn; destruct a as [|[|a]]; simpl in Ha; try lia; simpl in Hn;
        try discriminate; injection Hn as <- _; reflexivity]]|]).
    simpl in Hk. lia.
Qed.

Theorem block_complete : fullgrad_complete R 0 Rplus Rmult block_network 13.
Proof.
  exact (check_sound block_certificate [1%positive] eq_refl block_network block_is_realised
           1%positive (or_introl eq_refl)).
Qed.
End Block.
