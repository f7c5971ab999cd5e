(** What has no consistent degree without an edit, each with its witness; and what the checker
    refuses. *)
From Coq Require Import List Arith Lia Lra Reals QArith.
From Fullgrad Require Import Composition Operations Certificate.
Import ListNotations.
Local Open Scope R_scope.

(** An elementwise f with derivative f' has the degree d where  x f'(x) = d f(x)  everywhere. *)
Definition has_degree (f f' : R -> R) (d : R) := forall x, x * f' x = d * f x.

(** Where f(0) is not 0 the degree could only be 0, and then f would be flat. *)
Lemma no_degree f f' : f 0 <> 0 -> f' 1 <> 0 -> forall d, ~ has_degree f f' d.
Proof.
  intros H0 H1 d H. pose proof (H 0) as Ha. pose proof (H 1) as Hb.
  assert (d = 0).
  { apply (Rmult_eq_reg_r (f 0)); auto. lra. }
  subst d. apply H1. lra.
Qed.

(** A self-gate u g(u), as GELU (g the normal distribution) and SiLU (g the logistic function): the
    degree at x is 1 + x g'(x)/g(x), so two points where that differs are a witness. *)
Lemma no_degree_of_gate g g' x y : x <> 0 -> y <> 0 ->
  x * g' x * g y <> y * g' y * g x ->
  forall d, ~ has_degree (fun x => x * g x) (fun x => g x + x * g' x) d.
Proof.
  intros Hx Hy Hne d H. apply Hne.
  assert (Hall : forall z, z <> 0 -> z * g' z = (d - 1) * g z).
  { intros z Hz. apply (Rmult_eq_reg_l z); auto. pose proof (H z). lra. }
  rewrite (Hall x Hx), (Hall y Hy). ring.
Qed.

(** GELU: g is the normal distribution's function, g' its density; SiLU below. *)
Theorem increasing_gate_has_no_degree g g' :
  0 < g 1 -> 0 < g (-1) -> 0 < g' 1 -> 0 < g' (-1) ->
  forall d, ~ has_degree (fun x => x * g x) (fun x => g x + x * g' x) d.
Proof.
  intros H1 H2 H3 H4. apply (no_degree_of_gate g g' 1 (-1)); try lra.
  pose proof (Rmult_lt_0_compat _ _ H3 H2). pose proof (Rmult_lt_0_compat _ _ H4 H1). lra.
Qed.

(** The logistic function, a softmax of two scores. *)
Definition logistic x := / (1 + exp (- x)).
Definition logistic' x := exp (- x) / (1 + exp (- x)) ^ 2.

Lemma logistic_derivative x : derivable_pt_lim logistic x (logistic' x).
Proof.
  pose proof (exp_pos (- x)). assert (Hne : 1 + exp (- x) <> 0) by (apply Rgt_not_eq; lra).
  assert (Hd : derivable_pt_lim (fun t => 1 + exp (- t)) x (- exp (- x))).
  { replace (- exp (- x)) with (0 + exp (- x) * (- 1)) by ring.
    apply (derivable_pt_lim_plus (fun _ => 1) (fun t => exp (- t))).
    - apply derivable_pt_lim_const.
    - apply (derivable_pt_lim_comp Ropp exp).
      + replace (-1) with (- (1)) by ring. apply derivable_pt_lim_opp, derivable_pt_lim_id.
      + apply derivable_pt_lim_exp. }
  unfold logistic'. replace (exp (- x) / (1 + exp (- x)) ^ 2)
    with ((0 * (1 + exp (- x)) - - exp (- x) * 1) / Rsqr (1 + exp (- x))).
  - intros eps He.
    destruct (derivable_pt_lim_div (fun _ => 1) (fun t => 1 + exp (- t)) x 0 (- exp (- x))
                (derivable_pt_lim_const 1 x) Hd Hne eps He) as [delta H0].
    exists delta. intros h Hh Hlt. specialize (H0 h Hh Hlt). unfold div_fct, logistic in *.
    unfold Rdiv in H0 at 1 2 3. rewrite !Rmult_1_l in H0. exact H0.
  - unfold Rsqr. field. lra.
Qed.

Theorem softmax_has_no_degree : forall d, ~ has_degree logistic logistic' d.
Proof.
  apply no_degree; unfold logistic, logistic'; apply Rgt_not_eq.
  - apply Rinv_0_lt_compat. pose proof (exp_pos (- 0)). lra.
  - apply Rdiv_lt_0_compat; [apply exp_pos | apply pow_lt]. pose proof (exp_pos (- (1))). lra.
Qed.

Theorem silu_has_no_degree :
  forall d, ~ has_degree (fun x => x * logistic x) (fun x => logistic x + x * logistic' x) d.
Proof.
  assert (H : forall t, 0 < 1 + exp t) by (intros t; pose proof (exp_pos t); lra).
  apply increasing_gate_has_no_degree; unfold logistic, logistic';
    first [apply Rinv_0_lt_compat, H | apply Rdiv_lt_0_compat; [apply exp_pos | apply pow_lt, H]].
Qed.

(** The gradient of a product is consistent with degree 2 and no other, so a residual sum with it,
    x + x y, has none. *)
Theorem product_has_degree_two d : (forall x y : R, y * x + x * y = d * (x * y)) -> d = 2.
Proof. intros H. specialize (H 1 1). lra. Qed.

Theorem residual_product_has_no_degree d :
  ~ (forall x y : R, (1 + y) * x + x * y = d * (x + x * y)).
Proof. intros H. pose proof (H 1 0). pose proof (H 1 1). lra. Qed.

(** ** The checker refuses *)
Local Open Scope Q_scope.
Definition product (d : Q) : certificate := [
  Leaf; Op (Node Product [Live 1 1; Live 1 1] [[(0%nat, 1); (1%nat, 1)]] false 1 d)].

Example refuse_product : check (product 2) [1%positive] = false. Proof. reflexivity. Qed.
Example refuse_wrong_degree : check (product 1) [1%positive] = false. Proof. reflexivity. Qed.
Example refuse_what_comes_later :
  check [Leaf; Op (Node Linear [Live 2 1] [[(0%nat, 1)]] false 1 1)] [1%positive] = false.
Proof. reflexivity. Qed.
Example refuse_opaque :  (* x + a value that carries no gradient *)
  check [Leaf; Op (Node Linear [Live 1 1; Held] [[(0%nat, 1)]; [(1%nat, 1)]] false 1 1)]
    [1%positive] = false.
Proof. reflexivity. Qed.
Example refuse_loose :  (* softmax of what has degree 1 *)
  check [Leaf; Op (Node Null [Live 1 1] [] false 1 0)] [1%positive] = false.
Proof. reflexivity. Qed.
Example refuse_bias_at_two :
  check [Leaf; Op (Node Homogeneous [Live 1 1] [[(0%nat, 2)]] true (1 # 2) 1)] [1%positive] = false.
Proof. reflexivity. Qed.
Example refuse_negative :
  check [Leaf; Op (Node Homogeneous [Live 1 1] [[(0%nat, -1)]] false (-1) 1)] [1%positive] = false.
Proof. reflexivity. Qed.
Example accept_square_by_half :
  check [Leaf; Op (Node Homogeneous [Live 1 1] [[(0%nat, 2)]] false (1 # 2) 1)] [1%positive] = true.
Proof. reflexivity. Qed.
