(** Certificates: a language, a checker that computes, and its soundness.

    A certificate says of every value of a network what it reads, how it grows with that, which
    edges carry a gradient and with which factor, and its degree. Where [check] accepts it, every
    network of that form is FullGrad-complete: at every size, input and parameter. *)
From Coq Require Export List QArith Qreals Reals PArith.
From Coq Require Import Arith Lia Lra Bool.
From Fullgrad Require Import Composition Operations.
Export ListNotations.
Open Scope Q_scope.

(** ** The language *)
(** What the operation of a step is: which rule it came by. *)
Inductive kind :=
  Linear | Product | Homogeneous | Piecewise | Secant | Freeze | Attention | Integral | Measured | Null.

Inductive edge :=
| Live (back : positive) (factor : Q)  (* reads the item [back] places before; times [factor] *)
| Held.                                (* carries no gradient *)

(** [monomials]: in each, the exponents of the arguments, by their place among the edges; [constant]:
    whether constants are added; [scale]: what the gradient of the result is multiplied by. *)
Record node := Node {
  kind_of : kind;
  edges : list edge;
  monomials : list (list (nat * Q));
  constant : bool;
  scale : Q;
  degree : Q }.

Inductive item := Leaf | Op (n : node).
Definition certificate := list item.
Bind Scope Q_scope with Q.
Arguments Live back%positive factor%Q.
Arguments Node kind_of edges%list monomials%list constant scale%Q degree%Q.

Definition item_degree (i : item) : Q := match i with Leaf => 1 | Op n => degree n end.

(** The exponent of argument [a] in a monomial; 0 where it is not in it. *)
Fixpoint power (m : list (nat * Q)) (a : nat) : Q :=
  match m with
  | [] => 0
  | (b, p) :: m' => if Nat.eqb a b then p else power m' a
  end.
Definition in_monomial (a : nat) (m : list (nat * Q)) : bool := existsb (fun q => Nat.eqb a (fst q)) m.
Definition mentioned (n : node) (a : nat) : bool := existsb (in_monomial a) (monomials n).

(** ** What a step means *)
Local Open Scope R_scope.

(** [V m]: the value of monomial [m]; [B]: that of the constants. The operation is their sum; an
    edge that carries a gradient has the operation's own Jacobian, times the factors, and by Euler
    that takes an argument to its exponent times the monomial. An argument in no monomial may be
    read in any way. Constants are bias leaves at degree 1 and coefficients at degree 0. *)
Definition means (n : node) (o : opR) (u : nat -> vecR) : Prop :=
  arity o = length (edges n) /\
  exists (V : nat -> vecR) (B : vecR), forall i, (i < dout o)%nat ->
    (monomials n <> [] ->
       fwd o u i = sumR (length (monomials n)) (fun m => V m i) + B i) /\
    (constant n = false -> B i = 0) /\
    sumR (nb o) (fun l => JB o u i l * bias o l) = Q2R (degree n) * B i /\
    (forall a, (a < arity o)%nat ->
       match nth a (edges n) Held with
       | Held => sumR (din o a) (fun l => J o u a i l * u a l) = 0
       | Live _ f =>
           mentioned n a = true ->
           sumR (din o a) (fun l => J o u a i l * u a l)
           = Q2R (scale n) * Q2R f * sumR (length (monomials n)) (fun m =>
               Q2R (power (nth m (monomials n) []) a) * V m i)
       end).

(** ** The checker *)
Local Open Scope Q_scope.

(** Degrees of the items before, the nearest first. *)
Fixpoint lookup (env : list Q) (back : positive) : option Q :=
  match env with
  | [] => None
  | d :: env' => match back with xH => Some d | _ => lookup env' (Pos.pred back) end
  end.

(** The degree that is seen through an edge. *)
Definition seen (env : list Q) (e : edge) : option Q :=
  match e with
  | Held => Some 0
  | Live b f => match lookup env b with Some d => Some (Qred (f * d)) | None => None end
  end.

Fixpoint all_seen (env : list Q) (es : list edge) : option (list Q) :=
  match es with
  | [] => Some []
  | e :: es' =>
      match seen env e, all_seen env es' with
      | Some d, Some ds => Some (d :: ds)
      | _, _ => None
      end
  end.

Fixpoint total_from (a : nat) (ds : list Q) (m : list (nat * Q)) : Q :=
  match ds with
  | [] => 0
  | d :: ds' => Qred (power m a * d + total_from (S a) ds' m)
  end.
Definition total := total_from 0.

Definition positive_factor (e : edge) : bool :=
  match e with Held => true | Live _ f => Qle_bool 0 f && negb (Qeq_bool f 0) end.

Fixpoint loose_from (n : node) (a : nat) (ds : list Q) : bool :=
  match ds with
  | [] => true
  | d :: ds' => (mentioned n a || Qeq_bool d 0) && loose_from n (S a) ds'
  end.

(** The kinds that say more than their monomials do. *)
Definition is_one (m : list (nat * Q)) : bool :=
  match m with [(_, p)] => Qeq_bool p 1 | _ => false end.
Definition natural (p : Q) : bool := (Qden (Qred p) =? 1)%positive && Qle_bool 1 p.
Definition kind_ok (n : node) : bool :=
  match kind_of n with
  | Linear => forallb is_one (monomials n)
  | Product => forallb (forallb (fun q => natural (snd q))) (monomials n)
  | Piecewise | Secant | Attention =>
      forallb is_one (monomials n) && Nat.eqb (length (monomials n)) 1
  | Null => match monomials n with [] => negb (constant n) | _ => false end
  | _ => true
  end.

Definition node_ok (env : list Q) (n : node) : bool :=
  match all_seen env (edges n) with
  | None => false
  | Some ds =>
      let d := match monomials n with [] => 0 | m :: _ => total ds m end in
      forallb positive_factor (edges n)
      && positive_factor (Live 1 (scale n))
      && forallb (fun m => Qeq_bool (total ds m) d) (monomials n)
      && forallb (forallb (fun q => Nat.ltb (fst q) (length ds))) (monomials n)
      && loose_from n 0 ds
      && (negb (constant n) || Qeq_bool d 1 || Qeq_bool d 0)
      && (match monomials n with [] => negb (constant n) | _ => true end)
      && Qeq_bool (degree n) (scale n * d)
      && kind_ok n
  end.

Fixpoint items_ok (env : list Q) (c : certificate) : bool :=
  match c with
  | [] => true
  | i :: c' =>
      (match i with Leaf => true | Op n => node_ok env n end)
      && items_ok (item_degree i :: env) c'
  end.

(** The degrees of a certificate's items, the last one first. *)
Definition degrees (c : certificate) : list Q := rev (map item_degree c).

(** [outs]: the outputs, counted from the end: 1 is the last item. *)
Definition check (c : certificate) (outs : list positive) : bool :=
  items_ok [] c
  && forallb (fun b => match lookup (degrees c) b with
                       | Some d => Qeq_bool d 1 | None => false end) outs.

(** ** Soundness *)
Local Open Scope R_scope.

(** A network of a certificate's form: any sizes, weights and inputs. *)
Definition realises (c : certificate) (P : list (instr R)) : Prop :=
  length P = length c /\ wf R 0 P /\
  forall k, (k < length c)%nat ->
    match nth k c Leaf with
    | Leaf => exists d x, at_ R 0 P k = Composition.Leaf d x
    | Op n => exists o args, at_ R 0 P k = App o args /\
        means n o (point R 0 P k args) /\
        forall a b f, (a < arity o)%nat -> nth a (edges n) Held = Live b f ->
          (args a + Pos.to_nat b = k)%nat
    end.

Definition all_complete (c : certificate) (outs : list positive) (P : list (instr R)) : Prop :=
  forall b, In b outs -> fullgrad_complete R 0 Rplus Rmult P (length c - Pos.to_nat b).

Lemma lookup_nth env : forall b d, lookup env b = Some d ->
  (Pos.to_nat b <= length env)%nat /\ nth (Pos.to_nat b - 1) env 0%Q = d.
Proof.
  induction env as [|x env IH]; intros b d H; [discriminate|].
  destruct (Pos.eq_dec b 1) as [->|Hb].
  - simpl in H. injection H as <-. simpl. split; [lia|reflexivity].
  - assert (H' : lookup env (Pos.pred b) = Some d) by (destruct b; auto; congruence).
    destruct (IH _ _ H') as [Hl Hn]. rewrite Pos2Nat.inj_pred in * by lia.
    pose proof (Pos2Nat.is_pos b). assert (1 < Pos.to_nat b)%nat by lia.
    split; [simpl; lia|]. replace (Pos.to_nat b - 1)%nat with (S (Nat.pred (Pos.to_nat b) - 1)) by lia.
    exact Hn.
Qed.

Lemma lookup_degree c k b d :
  (k <= length c)%nat -> lookup (degrees (firstn k c)) b = Some d ->
  (Pos.to_nat b <= k)%nat /\ d = item_degree (nth (k - Pos.to_nat b) c Leaf).
Proof.
  intros Hk H. destruct (lookup_nth _ _ _ H) as [Hl Hn]. unfold degrees in *.
  rewrite rev_length, map_length, firstn_length_le in Hl by auto. split; auto.
  pose proof (Pos2Nat.is_pos b). rewrite rev_nth in Hn by (rewrite map_length, firstn_length_le; lia).
  rewrite map_length, firstn_length_le in Hn by auto.
  replace (k - S (Pos.to_nat b - 1))%nat with (k - Pos.to_nat b)%nat in Hn by lia.
  rewrite <- Hn, (nth_indep _ 0%Q (item_degree Leaf)) by (rewrite map_length, firstn_length_le; lia).
  rewrite map_nth. f_equal. rewrite <- (firstn_skipn k c) at 2.
  rewrite app_nth1 by (rewrite firstn_length_le; lia). reflexivity.
Qed.

Lemma items_ok_nth c : forall env k n, items_ok env c = true -> nth_error c k = Some (Op n) ->
  node_ok (degrees (firstn k c) ++ env) n = true.
Proof.
  induction c as [|i c IH]; intros env k n H Hk; [destruct k; discriminate|].
  simpl in H. apply andb_true_iff in H as [Hi Hc]. destruct k as [|k]; simpl in Hk.
  - injection Hk as ->. exact Hi.
  - simpl. unfold degrees. simpl. rewrite <- app_assoc. apply (IH _ _ _ Hc Hk).
Qed.

Lemma all_seen_nth env : forall es ds, all_seen env es = Some ds ->
  length ds = length es /\
  forall a, (a < length es)%nat -> seen env (nth a es Held) = Some (nth a ds 0%Q).
Proof.
  induction es as [|e es IH]; intros ds H; simpl in H.
  - injection H as <-. split; auto. intros a Ha. inversion Ha.
  - destruct (seen env e) as [d|] eqn:E; [|discriminate].
    destruct (all_seen env es) as [ds'|] eqn:E'; [|discriminate]. injection H as <-.
    destruct (IH _ eq_refl) as [Hl Hn]. split; [simpl; now rewrite Hl|].
    intros [|a] Ha; simpl; auto. apply Hn. simpl in Ha. lia.
Qed.

Lemma Q2R_red q : Q2R (Qred q) = Q2R q.
Proof. apply Qeq_eqR, Qred_correct. Qed.

Lemma Q2R_0 : Q2R 0 = 0.
Proof. unfold Q2R. simpl. lra. Qed.

Lemma Q2R_1 : Q2R 1 = 1.
Proof. unfold Q2R. simpl. lra. Qed.

Lemma Q2R_bool p q : Qeq_bool p q = true -> Q2R p = Q2R q.
Proof. intros H. now apply Qeq_eqR, Qeq_bool_iff. Qed.

Lemma total_from_sum m : forall ds a,
  Q2R (total_from a ds m)
  = sumR (length ds) (fun j => Q2R (power m (a + j)) * Q2R (nth j ds 0%Q)).
Proof.
  assert (Hhead : forall n f, sumR (S n) f = f O + sumR n (fun j => f (S j))).
  { induction n; intros f; [simpl; ring|]. change (sumR (S (S n)) f) with (sumR (S n) f + f (S n)).
    rewrite IHn. simpl. ring. }
  induction ds as [|d ds IH]; intros a; [apply Q2R_0|].
  change (total_from a (d :: ds) m) with (Qred (power m a * d + total_from (S a) ds m)%Q).
  rewrite Q2R_red, Q2R_plus, Q2R_mult, IH.
  change (length (d :: ds)) with (S (length ds)). rewrite Hhead, Nat.add_0_r. simpl nth. f_equal.
  apply sumR_ext; intros j Hj. now rewrite Nat.add_succ_comm.
Qed.

Lemma loose_nth n : forall ds a, loose_from n a ds = true ->
  forall j, (j < length ds)%nat -> mentioned n (a + j) = false -> Q2R (nth j ds 0%Q) = 0.
Proof.
  induction ds as [|d ds IH]; intros a H j Hj Hm; [inversion Hj|].
  simpl in H. apply andb_true_iff in H as [H1 H2]. destruct j as [|j]; simpl.
  - rewrite Nat.add_0_r in Hm. rewrite Hm in H1. simpl in H1. rewrite (Q2R_bool _ _ H1). apply Q2R_0.
  - apply (IH (S a)); auto; [simpl in Hj; lia|]. now rewrite Nat.add_succ_comm.
Qed.

Lemma power_outside m a : in_monomial a m = false -> power m a = 0%Q.
Proof.
  induction m as [|[b p] m IH]; simpl; auto. intros H. apply orb_false_iff in H as [H1 H2].
  rewrite H1. auto.
Qed.

Lemma positive_factor_neq f : positive_factor (Live 1 f) = true -> Q2R f <> 0.
Proof.
  simpl. intros H. apply andb_true_iff in H as [_ H]. apply negb_true_iff in H. intros Hf.
  assert (E : Qeq_bool f 0 = true); [|congruence]. apply Qeq_bool_iff, eqR_Qeq. now rewrite Q2R_0.
Qed.

(** The one rule: a node that is accepted is consistent. *)
Lemma node_consistent env n o u e :
  node_ok env n = true -> means n o u ->
  (forall a b f, (a < arity o)%nat -> nth a (edges n) Held = Live b f ->
     exists d, lookup env b = Some d /\ e a = Q2R d) ->
  consistent_atR o e (Q2R (degree n)) u.
Proof.
  unfold node_ok. destruct (all_seen env (edges n)) as [ds|] eqn:Hs; [|discriminate].
  intros H [Har [V [B Hm]]] He. set (d := match monomials n with [] => 0%Q | m :: _ => total ds m end) in *.
  repeat (apply andb_true_iff in H as [H ?]).
  rename H into Hpos, H0 into Hkind, H1 into Hdeg, H2 into Hnil, H3 into Hbias, H4 into Hloose,
    H5 into Hplaces, H6 into Htot, H7 into Hscale.
  destruct (all_seen_nth _ _ _ Hs) as [Hlen Hseen]. rewrite forallb_forall in Hpos, Htot.
  assert (Hfactor : forall a b f, (a < arity o)%nat -> nth a (edges n) Held = Live b f ->
            Q2R f <> 0 /\ Q2R (nth a ds 0%Q) = Q2R f * e a).
  { intros a b f Ha Hn. rewrite Har in Ha. split.
    - apply positive_factor_neq. apply (Hpos (Live b f)). rewrite <- Hn. now apply nth_In.
    - destruct (He a b f) as [q [Hq ->]]; [now rewrite Har|auto|]. specialize (Hseen a Ha).
      rewrite Hn in Hseen. cbn [seen] in Hseen. rewrite Hq in Hseen.
      replace (nth a ds 0%Q) with (Qred (f * q)) by congruence.
      now rewrite Q2R_red, Q2R_mult. }
  assert (Hheld : forall a, (a < arity o)%nat -> nth a (edges n) Held = Held -> Q2R (nth a ds 0%Q) = 0).
  { intros a Ha Hn. rewrite Har in Ha. specialize (Hseen a Ha). rewrite Hn in Hseen.
    cbn [seen] in Hseen. injection Hseen as <-. apply Q2R_0. }
  assert (HD : Q2R (degree n) = Q2R (scale n) * Q2R d) by (rewrite (Q2R_bool _ _ Hdeg); apply Q2R_mult).
  intros i Hi. destruct (Hm i Hi) as [Hval [Hb [HJB HJ]]].
  (* what each argument is handed, in terms of the degrees that are seen *)
  assert (Harg : forall a, (a < arity o)%nat ->
    e a * sumR (din o a) (fun l => J o u a i l * u a l)
    = sumR (length (monomials n)) (fun m => Q2R (scale n) *
        (Q2R (power (nth m (monomials n) []) a) * Q2R (nth a ds 0%Q)) * V m i)).
  { intros a Ha. specialize (HJ a Ha). destruct (nth a (edges n) Held) as [b f|] eqn:Hn.
    - destruct (Hfactor a b f Ha Hn) as [Hf Hds]. destruct (mentioned n a) eqn:Hmen.
      + rewrite HJ by auto. rewrite <- !sumR_mul_l. apply sumR_ext; intros m Hmm. rewrite Hds. ring.
      + assert (Hz : Q2R (nth a ds 0%Q) = 0).
        { apply (loose_nth n ds 0 Hloose); auto. rewrite Hlen, <- Har. auto. }
        rewrite (sumR_zero (length (monomials n))) by (intros m Hmm; rewrite Hz; ring).
        rewrite Hz in Hds. assert (e a = 0).
        { apply (Rmult_eq_reg_l (Q2R f)); auto. rewrite <- Hds. ring. }
        rewrite H. ring.
    - rewrite HJ, (sumR_zero (length (monomials n))); [ring|].
      intros m Hmm. rewrite (Hheld a Ha Hn). ring. }
  rewrite (sumR_ext (arity o) _ _ Harg).
  rewrite (sum_swap R 0 1 Rplus Rmult Rminus Ropp RTheory), HJB.
  assert (Heach : forall m, (m < length (monomials n))%nat ->
    sumR (arity o) (fun a => Q2R (scale n) *
      (Q2R (power (nth m (monomials n) []) a) * Q2R (nth a ds 0%Q)) * V m i)
    = Q2R (degree n) * V m i).
  { intros m Hmm. rewrite sumR_mul_r. f_equal. rewrite sumR_mul_l, HD. f_equal.
    pose proof (Htot (nth m (monomials n) []) (nth_In (monomials n) [] Hmm)) as Ht.
    rewrite <- (Q2R_bool _ _ Ht). unfold total. rewrite total_from_sum.
    rewrite Hlen, Har. apply sumR_ext; intros j Hj. reflexivity. }
  rewrite (sumR_ext (length (monomials n)) _ _ Heach), sumR_mul_l.
  destruct (monomials n) as [|m0 ms] eqn:Emono.
  - apply negb_true_iff in Hnil. rewrite (Hb Hnil). subst d. rewrite HD, Q2R_0. simpl. ring.
  - rewrite Hval by discriminate. ring.
Qed.

(** ** The theorem that a certificate buys *)
Theorem check_sound : forall c outs, check c outs = true ->
  forall P, realises c P -> all_complete c outs P.
Proof.
  intros c outs H P [Hlen [Hwf HP]] b Hb. unfold check in H.
  apply andb_true_iff in H as [Hitems Houts]. rewrite forallb_forall in Houts.
  specialize (Houts b Hb). destruct (lookup (degrees c) b) as [q|] eqn:Hq; [|discriminate].
  pose proof Hq as Hq'. rewrite <- (firstn_all c) in Hq' at 1.
  destruct (lookup_degree c (length c) b q (Nat.le_refl _) Hq') as [Hle ->].
  pose proof (Pos2Nat.is_pos b).
  apply (fullgrad_completeness R 0 1 Rplus Rmult Rminus Ropp RTheory P
           (fun k => Q2R (item_degree (nth k c Leaf)))); auto.
  - intros k Hk. rewrite Hlen in Hk. specialize (HP k Hk).
    assert (Hnth : nth_error c k = Some (nth k c Leaf)) by (now apply nth_error_nth').
    destruct (nth k c Leaf) as [|n] eqn:En.
    + destruct HP as [d [x ->]]. apply Q2R_1.
    + destruct HP as [o [args [-> [Hmeans Hwire]]]].
      pose proof (items_ok_nth c [] k n Hitems Hnth) as Hok. rewrite app_nil_r in Hok.
      apply (node_consistent _ _ _ _ _ Hok Hmeans). intros a p f Ha Hn.
      unfold node_ok in Hok.
      destruct (all_seen (degrees (firstn k c)) (edges n)) as [ds|] eqn:Hs; [|discriminate].
      destruct (all_seen_nth _ _ _ Hs) as [_ Hseen]. destruct Hmeans as [Har _]. rewrite Har in Ha.
      specialize (Hseen a Ha). rewrite Hn in Hseen. cbn [seen] in Hseen.
      destruct (lookup (degrees (firstn k c)) p) as [d|] eqn:Hp; [|discriminate].
      exists d. split; auto. destruct (lookup_degree c k p d ltac:(lia) Hp) as [Hpk ->].
      rewrite <- Har in Ha. pose proof (Hwire a p f Ha Hn).
      now replace (args a) with (k - Pos.to_nat p)%nat by lia.
  - lia.
  - rewrite (Q2R_bool _ _ Houts). apply Q2R_1.
Qed.
