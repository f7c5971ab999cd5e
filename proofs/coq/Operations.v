(** One lemma a class of operations, over the reals: each edited operator is complete where what it
    reads and itself have degree 1, and Euler's relation for any degree. *)
From Coq Require Import List Arith Lia Bool Reals Lra.
From Fullgrad Require Import Composition.
Import ListNotations.
Local Open Scope R_scope.

Arguments Op {A}.
Arguments arity {A}. Arguments din {A}. Arguments dout {A}. Arguments nb {A}.
Arguments bias {A}. Arguments fwd {A}. Arguments J {A}. Arguments JB {A}.
Arguments Leaf {A}. Arguments App {A}.

Notation sumR := (sum R 0 Rplus).
Notation dotR := (dot R 0 Rplus Rmult).
Notation opR := (op R).
Notation vecR := (vec R).
Notation completeR := (complete R 0 Rplus Rmult).
Notation complete_atR := (complete_at R 0 Rplus Rmult).
Notation consistent_atR := (consistent_at R 0 Rplus Rmult).

Definition delta (i l : nat) : R := if Nat.eqb i l then 1 else 0.

Lemma sumR_ext n f g : (forall i, (i < n)%nat -> f i = g i) -> sumR n f = sumR n g.
Proof. apply sum_ext. Qed.

Lemma sumR_delta n i f : (i < n)%nat -> sumR n (fun l => delta i l * f l) = f i.
Proof.
  intros H. rewrite (sumR_ext n _ (fun l => if Nat.eqb i l then f l else 0)).
  - exact (sum_pick R 0 1 Rplus Rmult Rminus Ropp RTheory n i f H).
  - intros l Hl. unfold delta. destruct (Nat.eqb i l); ring.
Qed.

Lemma sumR_add n f g : sumR n (fun i => f i + g i) = sumR n f + sumR n g.
Proof. apply (sum_add R 0 1 Rplus Rmult Rminus Ropp RTheory). Qed.
Lemma sumR_mul_l n c f : sumR n (fun i => c * f i) = c * sumR n f.
Proof. apply (sum_mul_l R 0 1 Rplus Rmult Rminus Ropp RTheory). Qed.
Lemma sumR_mul_r n c f : sumR n (fun i => f i * c) = sumR n f * c.
Proof. apply (sum_mul_r R 0 1 Rplus Rmult Rminus Ropp RTheory). Qed.
Lemma sumR_zero n f : (forall i, (i < n)%nat -> f i = 0) -> sumR n f = 0.
Proof. apply (sum_zero R 0 1 Rplus Rmult Rminus Ropp RTheory). Qed.
Lemma sumR_const n c : sumR n (fun _ => c) = INR n * c.
Proof. induction n; [simpl; ring|]. rewrite S_INR. simpl sum. rewrite IHn. ring. Qed.

Lemma sumR_reindex T d f :
  sumR (T * d) f = sumR T (fun s => sumR d (fun c => f (s * d + c)%nat)).
Proof.
  induction T; simpl; auto. rewrite <- IHT.
  assert (Hs : forall n m, sumR (n + m) f = sumR n f + sumR m (fun c => f (n + c)%nat)).
  { intros n m. induction m; simpl.
    - rewrite Nat.add_0_r. ring.
    - rewrite Nat.add_succ_r. simpl. rewrite IHm. ring. }
  rewrite Nat.add_comm, Hs. reflexivity.
Qed.

(** ** The frozen-coefficient lemma: y = C(u) u + b, with the dependence of the
    coefficient [C] on [u] pruned from the backward pass.  (pruning) *)
Definition frozen k dins m (C : (nat -> vecR) -> nat -> nat -> nat -> R) (b : vecR) : opR :=
  Op k dins m m b
     (fun u i => sumR k (fun a => sumR (dins a) (fun l => C u a i l * u a l)) + b i)
     C (fun _ => delta).

Lemma frozen_complete k dins m C b : completeR (frozen k dins m C b).
Proof. intros u i Hi. simpl in *. now rewrite sumR_delta. Qed.

(** ** Affine maps (also conv, mean-pool, residual add, concat, reshape) *)
Definition affine k dins m (W : nat -> nat -> nat -> R) b : opR :=
  frozen k dins m (fun _ => W) b.
Theorem affine_complete k dins m W b : completeR (affine k dins m W b).
Proof. apply frozen_complete. Qed.

(** ** Diagonal operators y_i = d(u)_i * u_i with [d] frozen *)
Definition diag n (f : vecR -> vecR) (d : vecR -> vecR) : opR :=
  Op 1 (fun _ => n) n 0 (fun _ => 0) (fun u => f (u 0%nat))
     (fun u _ i l => delta i l * d (u 0%nat) i) (fun _ _ _ => 0).

Lemma diag_complete n f d :
  (forall x i, f x i = d x i * x i) -> completeR (diag n f d).
Proof.
  intros H u i Hi. simpl in *.
  rewrite (sumR_ext n _ (fun l => delta i l * (d (u 0%nat) i * u 0%nat l))) by (intros; ring).
  rewrite sumR_delta by auto. rewrite H. ring.
Qed.

(** ReLU with its usual (sub)gradient [1_{x>0}] *)
Definition relu_d (x : R) : R := if Rlt_dec 0 x then 1 else 0.
Definition relu n : opR :=
  diag n (fun x i => Rmax (x i) 0) (fun x i => relu_d (x i)).
Theorem relu_complete n : completeR (relu n).
Proof.
  apply diag_complete. intros x i. unfold relu_d, Rmax.
  destruct (Rlt_dec 0 (x i)); destruct (Rle_dec (x i) 0); lra.
Qed.
Lemma relu_d_is_derivative x : x <> 0 -> derivable_pt_lim (fun t => Rmax t 0) x (relu_d x).
Proof.
  intros Hx. unfold relu_d. intros eps Heps.
  assert (Hp : 0 < Rabs x) by (apply Rabs_pos_lt; auto).
  exists (mkposreal _ Hp). intros h Hh Hlt. simpl in Hlt.
  unfold Rabs in Hlt. unfold Rmax.
  destruct (Rlt_dec 0 x); destruct (Rle_dec (x + h) 0); destruct (Rle_dec x 0);
  destruct (Rcase_abs h); destruct (Rcase_abs x); try lra;
  match goal with |- Rabs ?e < _ => replace e with 0 by (field; auto) end;
  rewrite Rabs_R0; auto.
Qed.

(** Gated nonlinearity x * g(x) (GELU, SiLU, ...) with [g] pruned *)
Definition gate n (g : R -> R) : opR :=
  diag n (fun x i => x i * g (x i)) (fun x i => g (x i)).
Theorem gate_complete n g : completeR (gate n g).
Proof. apply diag_complete. intros; ring. Qed.

(** RMSNorm y_i = x_i * s(x) * w_i, [s] (any function of x) pruned *)
Definition rmsnorm n (s : vecR -> R) (w : vecR) : opR :=
  diag n (fun x i => x i * s x * w i) (fun x i => s x * w i).
Theorem rmsnorm_complete n s w : completeR (rmsnorm n s w).
Proof. apply diag_complete. intros; ring. Qed.

(** LayerNorm y_i = (x_i - mean x) * s(x) * w_i + b_i, [s] (= 1/std) pruned *)
Definition mean n (x : vecR) : R := / INR n * sumR n x.
Definition layernorm n (s : vecR -> R) (w b : vecR) : opR :=
  Op 1 (fun _ => n) n n b
     (fun u i => (u 0%nat i - mean n (u 0%nat)) * s (u 0%nat) * w i + b i)
     (fun u _ i l => (delta i l - / INR n) * s (u 0%nat) * w i) (fun _ => delta).
Theorem layernorm_complete n s w b : completeR (layernorm n s w b).
Proof.
  intros u i Hi. simpl in *. rewrite (sumR_delta n i b) by auto. unfold mean.
  set (x := u 0%nat).
  assert (E : sumR n (fun l => (delta i l - / INR n) * s x * w i * x l)
              = s x * w i * x i + - (/ INR n) * (s x * w i) * sumR n x).
  { rewrite <- sumR_mul_l.
    rewrite (sumR_ext n (fun l => (delta i l - / INR n) * s x * w i * x l)
      (fun l => delta i l * (s x * w i * x l) + - (/ INR n) * (s x * w i) * x l))
      by (intros; ring).
    now rewrite sumR_add, sumR_delta by auto. }
  rewrite E. ring.
Qed.

(** ** Products u*v *)
Definition mulop n (ju jv : R -> R -> R) : opR :=
  Op 2 (fun _ => n) n 0 (fun _ => 0) (fun u i => u 0%nat i * u 1%nat i)
     (fun u a i l => delta i l *
        match a with O => ju (u 0%nat i) (u 1%nat i) | _ => jv (u 0%nat i) (u 1%nat i) end)
     (fun _ _ _ => 0).

(** Exact characterisation: a rule for the product is complete iff it splits u*v. *)
Theorem mulop_complete_iff n ju jv :
  (0 < n)%nat ->
  completeR (mulop n ju jv) <-> (forall x y, ju x y * x + jv x y * y = x * y).
Proof.
  intros Hn. split.
  - intros H x y. specialize (H (fun a _ => match a with O => x | _ => y end) 0%nat Hn).
    simpl in H. rewrite !Rplus_0_l, Rplus_0_r in H.
    rewrite (sumR_ext n _ (fun l => delta 0 l * (ju x y * x))) in H by (intros; ring).
    rewrite (sumR_ext n (fun l => delta 0 l * jv x y * y) (fun l => delta 0 l * (jv x y * y)))
      in H by (intros; ring).
    rewrite !sumR_delta in H by auto. lra.
  - intros H u i Hi. simpl in *.
    rewrite (sumR_ext n _ (fun l => delta i l * (ju (u 0%nat i) (u 1%nat i) * u 0%nat l)))
      by (intros; ring).
    rewrite (sumR_ext n (fun l => _ * _ * u 1%nat l)
       (fun l => delta i l * (jv (u 0%nat i) (u 1%nat i) * u 1%nat l))) by (intros; ring).
    rewrite !sumR_delta by auto. rewrite <- (H (u 0%nat i) (u 1%nat i)). ring.
Qed.

Definition mul_scaled n th := mulop n (fun _ y => th * y) (fun x _ => (1 - th) * x).
Theorem mul_scaled_complete n th : completeR (mul_scaled n th).
Proof.
  destruct n; [intros u i Hi; simpl in Hi; lia|].
  apply mulop_complete_iff; [lia|]. intros; ring.
Qed.
Definition mul_half n := mul_scaled n (1 / 2).
Theorem mul_half_complete n : completeR (mul_half n).
Proof. apply mul_scaled_complete. Qed.
Definition mul_prune n := mulop n (fun _ y => y) (fun _ _ => 0).
Theorem mul_prune_complete n : completeR (mul_prune n).
Proof.
  destruct n; [intros u i Hi; simpl in Hi; lia|].
  apply mulop_complete_iff; [lia|]. intros; ring.
Qed.

(** (d) The full gradient of u*v is NOT complete. *)
Definition mul_full n := mulop n (fun _ y => y) (fun x _ => x).
Theorem mul_full_is_the_gradient x y :
  derivable_pt_lim (fun t => t * y) x y /\ derivable_pt_lim (fun t => x * t) y x.
Proof.
  split; intros eps He; exists (mkposreal 1 Rlt_0_1); intros h Hh _;
  match goal with |- Rabs ?e < _ => replace e with 0 by (field; auto) end;
  rewrite Rabs_R0; auto.
Qed.
Theorem mul_full_not_complete n : (0 < n)%nat -> ~ completeR (mul_full n).
Proof.
  intros Hn H. unfold mul_full in H. rewrite mulop_complete_iff in H by auto.
  specialize (H 1 1). lra.
Qed.

(** ** Attention: y = A(x) V with A (any function, e.g. softmax(QK^T)) pruned.
    Arg 0: whatever A is computed from; arg 1: V, row-major T x d. *)
Definition attention n0 T S d (Aw : vecR -> nat -> nat -> R) : opR :=
  Op 2 (fun a => match a with O => n0 | _ => (S * d)%nat end) (T * d) 0 (fun _ => 0)
     (fun u i => sumR S (fun s => Aw (u 0%nat) (i / d)%nat s * u 1%nat (s * d + i mod d)%nat))
     (fun u a i l => match a with
        | O => 0
        | _ => delta (i mod d) (l mod d) * Aw (u 0%nat) (i / d)%nat (l / d)%nat end)
     (fun _ _ _ => 0).
Theorem attention_complete n0 T S d Aw : completeR (attention n0 T S d Aw).
Proof.
  intros u i Hi. simpl in *. rewrite (sumR_zero n0) by (intros; ring).
  assert (Hd : d <> 0%nat) by (intros ->; lia).
  rewrite sumR_reindex, !Rplus_0_l, Rplus_0_r. apply sumR_ext; intros s Hs.
  rewrite (sumR_ext d _ (fun c => delta (i mod d) c *
      (Aw (u 0%nat) (i / d)%nat s * u 1%nat (s * d + c)%nat))).
  - rewrite sumR_delta; auto. apply Nat.mod_upper_bound; auto.
  - intros c Hc.
    replace ((s * d + c) mod d)%nat with c
      by (rewrite Nat.add_comm, Nat.mod_add, Nat.mod_small; auto).
    replace ((s * d + c) / d)%nat with s
      by (rewrite Nat.add_comm, Nat.div_add, Nat.div_small; auto).
    unfold delta. destruct (Nat.eqb_spec (i mod d) c) as [<-|]; ring.
Qed.

(** ** k-linear product with the full gradient scaled by 1/k *)
Fixpoint prodR k (f : nat -> R) : R := match k with O => 1 | S m => prodR m f * f m end.
Lemma prodR_ext k f g : (forall a, (a < k)%nat -> f a = g a) -> prodR k f = prodR k g.
Proof. induction k; intros H; simpl; auto. rewrite IHk, H; auto. Qed.
Lemma prod_except k a f : (a < k)%nat ->
  prodR k (fun b => if Nat.eqb b a then 1 else f b) * f a = prodR k f.
Proof.
  induction k; intros H; [lia|]. simpl. destruct (Nat.eqb_spec k a) as [->|Hne].
  - rewrite (prodR_ext a _ f); [ring|]. intros b Hb. destruct (Nat.eqb_spec b a); [lia|auto].
  - rewrite <- IHk by lia. ring.
Qed.
Definition prodop k n (sc : R) : opR :=
  Op k (fun _ => n) n 0 (fun _ => 0) (fun u i => prodR k (fun b => u b i))
     (fun u a i l => delta i l * (sc * prodR k (fun b => if Nat.eqb b a then 1 else u b i)))
     (fun _ _ _ => 0).
Theorem prodop_complete k n : (0 < k)%nat -> completeR (prodop k n (/ INR k)).
Proof.
  intros Hk u i Hi. simpl in *.
  rewrite (sumR_ext k _ (fun a => / INR k * prodR k (fun b => u b i))).
  - rewrite sumR_const. field. apply not_0_INR; lia.
  - intros a Ha.
    rewrite (sumR_ext n _ (fun l => delta i l * (/ INR k *
       prodR k (fun b => if Nat.eqb b a then 1 else u b i) * u a l))) by (intros; ring).
    rewrite sumR_delta by auto.
    rewrite <- (prod_except k a (fun b => u b i)) by auto. ring.
Qed.

(** ** Euler: positively homogeneous of degree k, differentiable => <grad f, x> = k f(x) *)
Definition norm1 n (h : vecR) : R := sumR n (fun i => Rabs (h i)).
Definition is_grad n (f : vecR -> R) (x g : vecR) : Prop :=
  forall eps, 0 < eps -> exists del, 0 < del /\ forall h,
    norm1 n h < del ->
    Rabs (f (fun i => x i + h i) - f x - dotR n g h) <= eps * norm1 n h.
Definition extensional n (f : vecR -> R) :=
  forall x y, (forall i, (i < n)%nat -> x i = y i) -> f x = f y.
Definition pos_hom (k : nat) (f : vecR -> R) :=
  forall t x, 0 < t -> f (fun i => t * x i) = t ^ k * f x.

Lemma norm1_nonneg n h : 0 <= norm1 n h.
Proof. unfold norm1. induction n; simpl; [lra|]. pose proof (Rabs_pos (h n)). lra. Qed.
Lemma norm1_scal n c h : norm1 n (fun i => c * h i) = Rabs c * norm1 n h.
Proof.
  unfold norm1. rewrite <- sumR_mul_l. apply sumR_ext; intros. apply Rabs_mult.
Qed.

Theorem euler n k f x g :
  extensional n f -> pos_hom k f -> is_grad n f x g -> dotR n g x = INR k * f x.
Proof.
  intros Hext Hhom Hg.
  assert (Hdir : derivable_pt_lim (fun t => f (fun i => t * x i)) 1 (dotR n g x)).
  { intros eps Heps.
    assert (HN : 0 < norm1 n x + 1) by (pose proof (norm1_nonneg n x); lra).
    destruct (Hg (eps / 2 / (norm1 n x + 1))) as [del [Hdel H]].
    { apply Rdiv_lt_0_compat; lra. }
    assert (Hd' : 0 < del / (norm1 n x + 1)) by (apply Rdiv_lt_0_compat; lra).
    exists (mkposreal _ Hd'). intros t Ht Hlt. simpl in Hlt.
    specialize (H (fun i => t * x i)). rewrite norm1_scal in H.
    assert (Hsmall : Rabs t * norm1 n x < del).
    { apply Rle_lt_trans with (Rabs t * (norm1 n x + 1)).
      - apply Rmult_le_compat_l; [apply Rabs_pos|lra].
      - apply Rmult_lt_reg_r with (/ (norm1 n x + 1)); [apply Rinv_0_lt_compat; lra|].
        rewrite Rmult_assoc, Rinv_r, Rmult_1_r by lra. exact Hlt. }
    specialize (H Hsmall).
    assert (E1 : f (fun i => (1 + t) * x i) = f (fun i => x i + t * x i))
      by (apply Hext; intros; ring).
    assert (E2 : f (fun i => 1 * x i) = f x) by (apply Hext; intros; ring).
    assert (E3 : dotR n g (fun i => t * x i) = t * dotR n g x).
    { unfold dot. rewrite <- sumR_mul_l. apply sumR_ext; intros; ring. }
    rewrite E1, E2. rewrite E3 in H.
    replace ((f (fun i => x i + t * x i) - f x) / t - dotR n g x)
      with ((f (fun i => x i + t * x i) - f x - t * dotR n g x) * / t) by (field; auto).
    rewrite Rabs_mult, Rabs_inv.
    assert (Hta : 0 < Rabs t) by (apply Rabs_pos_lt; auto).
    apply Rle_lt_trans with
      (eps / 2 / (norm1 n x + 1) * (Rabs t * norm1 n x) * / Rabs t).
    - apply Rmult_le_compat_r; auto. left. now apply Rinv_0_lt_compat.
    - replace (eps / 2 / (norm1 n x + 1) * (Rabs t * norm1 n x) * / Rabs t)
        with (eps / 2 * (norm1 n x / (norm1 n x + 1))) by (field; split; lra).
      assert (norm1 n x / (norm1 n x + 1) <= 1).
      { apply Rmult_le_reg_r with (norm1 n x + 1); [lra|].
        unfold Rdiv. rewrite Rmult_assoc, Rinv_l by lra. lra. }
      apply Rle_lt_trans with (eps / 2 * 1); [apply Rmult_le_compat_l; lra|lra]. }
  assert (Hpow : derivable_pt_lim (fun t => f (fun i => t * x i)) 1 (INR k * f x)).
  { assert (Hp : derivable_pt_lim (fun t => t ^ k * f x) 1 (INR k * f x)).
    { replace (INR k * f x) with (INR k * 1 ^ pred k * f x + 1 ^ k * 0)
        by (rewrite !pow1; ring).
      apply (derivable_pt_lim_mult (fun t => t ^ k) (fun _ => f x)).
      - apply derivable_pt_lim_pow.
      - apply derivable_pt_lim_const. }
    intros eps Heps. destruct (Hp eps Heps) as [d Hd].
    assert (Hmin : 0 < Rmin d (1 / 2)) by (apply Rmin_pos; [apply cond_pos|lra]).
    exists (mkposreal _ Hmin). intros h Hh Hlt. simpl in Hlt.
    assert (Hh1 : Rabs h < d) by (apply Rlt_le_trans with (1 := Hlt); apply Rmin_l).
    assert (Hh2 : Rabs h < 1 / 2) by (apply Rlt_le_trans with (1 := Hlt); apply Rmin_r).
    apply Rabs_def2 in Hh2. rewrite !Hhom by lra. now apply Hd. }
  eapply uniqueness_limite; eauto.
Qed.

(** Consequence 1: scaling the full gradient by 1/k is complete for degree k >= 1. *)
Corollary euler_scaled_complete n k f x g :
  (0 < k)%nat -> extensional n f -> pos_hom k f -> is_grad n f x g ->
  f x = dotR n (fun i => / INR k * g i) x.
Proof.
  intros Hk He Hh Hg. unfold dot.
  rewrite (sumR_ext n _ (fun i => / INR k * (g i * x i))) by (intros; ring).
  rewrite sumR_mul_l. fold (dotR n g x). rewrite (euler n k f x g) by auto.
  field. apply not_0_INR; lia.
Qed.

(** Consequence 2 (impossibility): degree 0 (normalised maps) -- no scalar rescaling
    of the full gradient is complete unless the value is 0. *)
Corollary degree0_no_scaling n f x g c :
  extensional n f -> pos_hom 0 f -> is_grad n f x g ->
  f x = dotR n (fun i => c * g i) x -> f x = 0.
Proof.
  intros He Hh Hg H. rewrite H. unfold dot.
  rewrite (sumR_ext n _ (fun i => c * (g i * x i))) by (intros; ring).
  rewrite sumR_mul_l. fold (dotR n g x). rewrite (euler n 0 f x g) by auto. simpl; ring.
Qed.
